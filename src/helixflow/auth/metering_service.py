"""MeteringService of proto/helixflow/auth/v1: what gateways and shippers ask of the ledger, the policies and the prices."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.rpc.generated.auth_v1 import metering_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
