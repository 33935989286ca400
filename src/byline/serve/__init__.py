"""The service: an attributor behind HTTP. Needs the extra ``serve``; `Served` and the client do not.

byline serve runs/x --task my_project:served
"""

from byline.serve.client import Client, ServiceError
from byline.serve.contract import Served, load
from byline.serve.limits import Limits

__all__ = ["Client", "Limits", "Served", "ServiceError", "load"]
