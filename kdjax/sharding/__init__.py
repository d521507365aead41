"""Meshes, and where arrays lie and functions run on them. The only part that builds meshes and calls shard_map.

A model names its axes; the tables here say where they lie.
"""

from kdjax.sharding.mesh import MeshConfig, TeacherMeshConfig
from kdjax.sharding.placement import ON_HOST, Placement, placement, placements

__all__ = ["ON_HOST", "MeshConfig", "Placement", "TeacherMeshConfig", "placement", "placements"]
