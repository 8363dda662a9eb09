"""Several devices: which array lives where."""

from jaxcomp.parallel.mesh import Placement, data_mesh

__all__ = ["Placement", "data_mesh"]
