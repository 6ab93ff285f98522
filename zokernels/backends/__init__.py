"""The implementations of the operations: each backend is a folder, and ``registry`` chooses among them."""

from .registry import Backend, BackendUnavailable, backend, get, select

__all__ = ["Backend", "BackendUnavailable", "backend", "get", "select"]
