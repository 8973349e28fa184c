"""Text to image over HTTP, as OpenAI's Images API, on Ray Serve. Ray and torch are imported when used.

schema       what may be asked: request models, limits        pictures     bytes to arrays and back, addresses that live an hour
engine       stages in one process, batched step by step      line         who may be under way, who waits, who is sent away
service      a request taken through stages, near or far      web          the FastAPI app: routes, errors, streams
asking       requests read, mistakes told                     models       a model's name to its stages
application  the Serve deployments: fused, split              running      start, wait until ready, stop
"""

from .running import Server, serve

__all__ = ["Server", "serve"]
