"""Takes the memsets of cuBLAS out of the chain of kernels that a captured step is.

For a product of more tiles than SMs, cuBLAS first clears a counter in its workspace. In a captured
step that memset lies between the product and the kernel that makes its input, though it needs
nothing from it, and two links of a graph take longer than one: on an H200 9 us lie between norm and
gate_up projection of Qwen3-8B, and 2 us after the memset waits for the kernel before the norm.

    before: o_proj -> norm -> memset -> gate_up          after: o_proj -> norm ---> gate_up
                                                                      \\-> memset -/

The graph is changed while it is being captured, which the driver allows for all but removing nodes:
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__STREAM.html (cuStreamGetCaptureInfo).
"""

from __future__ import annotations

from typing import Any

from green_ctx import Driver

# Kernels that use no memory of cuBLAS, so that a memset may pass them. What runs before them may be
# another product that still counts in the same place; the memset stays behind that.
PASSABLE = frozenset({"_rms_norm_kernel"})
# CUgraphNodeType
KERNEL, MEMSET = 0, 2


class CapturingGraph:
    """The graph that is being captured on a stream.

    Args:
        driver: the driver.
        stream: handle of the stream (CUstream); it is capturing.

    Raises:
        DriverError: also from the methods: the driver refused a call.
    """

    def __init__(self, driver: Driver, stream: int) -> None:
        self.driver = driver
        self.graph: Any = self._call("cuStreamGetCaptureInfo", stream, suffix="_v3")[2]

    def hoist_memsets(self) -> int:
        """Lets every memset pass the kernel before it, where that is safe; how many it was."""
        _, count = self.driver("cuGraphGetNodes", self.graph, 0)
        nodes, _ = self.driver("cuGraphGetNodes", self.graph, count)
        return sum(self._type(node) == MEMSET and self._hoist(node) for node in nodes)

    def _hoist(self, memset: Any) -> bool:
        before, after = self._dependencies(memset), self._dependents(memset)
        if len(before) != 1 or len(after) != 1:
            return False
        kernel, product = before[0], after[0]
        earlier = self._dependencies(kernel)
        if not earlier or len(self._dependencies(product)) != 1:
            return False
        if self._type(kernel) != KERNEL or self._name(kernel) not in PASSABLE:
            return False
        self._call("cuGraphRemoveDependencies", self.graph, [kernel], [memset], None, 1)
        sources, targets = [*earlier, kernel], [*[memset] * len(earlier), product]
        self._call("cuGraphAddDependencies", self.graph, sources, targets, None, len(sources))
        return True

    def _dependencies(self, node: Any) -> list[Any]:
        return self._neighbours("cuGraphNodeGetDependencies", node)

    def _dependents(self, node: Any) -> list[Any]:
        return self._neighbours("cuGraphNodeGetDependentNodes", node)

    def _neighbours(self, function: str, node: Any) -> list[Any]:
        count = self._call(function, node, 0)[-1]
        return list(self._call(function, node, count)[0])[:count] if count else []

    def _type(self, node: Any) -> int:
        return int(self.driver("cuGraphNodeGetType", node))

    def _name(self, kernel: Any) -> str:
        params = self.driver("cuGraphKernelNodeGetParams", kernel)
        if int(params.func):
            return bytes(self.driver("cuFuncGetName", params.func)).decode()
        return bytes(self.driver("cuKernelGetName", params.kern)).decode()

    def _call(self, function: str, *args: Any, suffix: str = "_v2") -> Any:
        """A function that knows edge data; bindings of CUDA 12 have it under a name of its own."""
        return self.driver(self.driver.newest(function, suffix), *args)
