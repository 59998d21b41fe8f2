"""`python -m tinsmithd.gateway`: the gateway as a process."""

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.server import Gateway
from tinsmithd.processes import serve

if __name__ == "__main__":
    serve(GatewaySettings, Gateway)
