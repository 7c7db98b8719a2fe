"""The part of jaxlib that annotations need: `jax.Device` is this class. jaxlib itself ships no types."""

from typing import Any

class Device:
    id: int
    process_index: int
    platform: str
    device_kind: str

    def memory_stats(self) -> dict[str, int] | None: ...

def __getattr__(name: str) -> Any: ...
