"""HTTP as callers see it: routes, dialects, and the relay that carries streams."""
