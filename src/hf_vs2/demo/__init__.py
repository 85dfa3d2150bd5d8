"""The whole way on bundled material: `hf-vs2 demo`."""

from .run import DemoResult, run_demo


__all__ = ["DemoResult", "run_demo"]
