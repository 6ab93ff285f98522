"""One folder a backend; ``registry`` chooses among them."""

from .registry import Backend, BackendUnavailable, backend, get, select

__all__ = ["Backend", "BackendUnavailable", "backend", "get", "select"]
