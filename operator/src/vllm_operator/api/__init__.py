"""The VLLMModel API: types, validation, CRD and reference, all from one set of Pydantic models. Pure."""
