"""Serving: `Engine` generates for many requests at the same time, and `mygpt serve` answers them over HTTP.

The engine needs no other packages. The HTTP server needs those of the extra `serve`: pip install 'mygpt[serve]'.
"""

from MyGPT.serving.engine import Engine
from MyGPT.serving.request import EngineClosed, QueueFull, Request, Token

__all__ = ["Engine", "EngineClosed", "QueueFull", "Request", "Token"]
