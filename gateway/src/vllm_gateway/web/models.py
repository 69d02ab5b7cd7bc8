"""`GET /models` and the OpenAI-compatible `GET /v1/models`, answered from the table."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel

from vllm_gateway.routing.table import Model, Table
from vllm_gateway.web.services import CALLER, Services

OWNER = "vllm-fleet"


class ModelState(BaseModel):
    """One model, the names that it answers to, and why it does not answer if it does not."""

    name: str
    names: list[str]
    adapters: list[str]
    ready: bool
    endpoints: int
    reason: str
    message: str


class ModelStates(BaseModel):
    """Every model, served or not. `notes` say what the gateway cannot see now."""

    models: list[ModelState]
    notes: list[str]


class OpenAIModel(BaseModel):
    """A name that a request may give, in OpenAI's shape. `parent` is the model of a LoRA adapter."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = OWNER
    parent: str | None = None


class OpenAIModels(BaseModel):
    """OpenAI's list shape."""

    object: str = "list"
    data: list[OpenAIModel]


def states(table: Table) -> ModelStates:
    return ModelStates(models=[_state(model) for model in table.models.values()], notes=list(table.notes))


def _state(model: Model) -> ModelState:
    return ModelState(
        name=model.key,
        names=sorted({model.key, *model.served_names}),
        adapters=list(model.adapters),
        ready=bool(model.endpoints),
        endpoints=len(model.endpoints),
        reason=model.reason,
        message=model.message,
    )


def models_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["models"])

    def seen(request: Request) -> Table:
        return services.admission.view(services.table(), request.scope[CALLER])

    @router.head("/models", include_in_schema=False)
    @router.get("/models", operation_id="models")
    async def models(request: Request) -> ModelStates:
        """Every model that the caller may use, and its state."""
        return states(seen(request))

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", operation_id="openai_models", response_model_exclude_none=True)
    async def openai_models(request: Request) -> OpenAIModels:
        """The names that requests may give."""
        table = seen(request)
        return OpenAIModels(data=[_named(table, name) for name in table.public_names()])

    @router.head("/v1/models/{name:path}", include_in_schema=False)
    @router.get("/v1/models/{name:path}", operation_id="openai_model", response_model_exclude_none=True)
    async def openai_model(request: Request, name: str) -> OpenAIModel:
        """One name."""
        table = seen(request)
        table.resolve(name)
        return _named(table, name)

    return router


def _named(table: Table, name: str) -> OpenAIModel:
    holders = table.names[name]
    parent = table.models[holders[0].key].public_name if holders[0].adapter else None
    return OpenAIModel(id=name, created=min(model.created for model in holders), parent=parent)
