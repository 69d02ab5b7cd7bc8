"""Which models there are, where they run, and which endpoint a request goes to. Pure: no I/O, no HTTP."""
