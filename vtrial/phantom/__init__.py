"""The phantom population: procedural whole-body PET/CT with exact organ masks.

A body is planned in numbers (`anthropometry`, `uptake`), painted as labels (`anatomy`) and rendered (`render`).
"""

from vtrial.phantom.population import Phantom, make_phantom

__all__ = ["Phantom", "make_phantom"]
