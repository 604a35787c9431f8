"""Which real PET/CT studies lie under a path, and whose they are, before any voxel is prepared.

`find.py` is the way in. `dicoms.py`, `niftis.py` and `listed.py` each know a form in which collections come,
`volumes.py` reads NIfTI pairs, `tables.py` and `people.py` join demographics, `content.py` knows duplicates. Subjects
get new ids; what the source calls them is in `Origin` alone, which nothing shows but the key (`key.py`) that a user
asks for.
"""

from vtrial.preparation.sources.find import find_studies, scanned_people
from vtrial.preparation.sources.key import check_key, source_key, write_key
from vtrial.preparation.sources.people import NOBODY, PERSON_COLUMNS
from vtrial.preparation.sources.study import Collection, LeftOut, Loader, Origin, Study

__all__ = [
    "NOBODY",
    "PERSON_COLUMNS",
    "Collection",
    "LeftOut",
    "Loader",
    "Origin",
    "Study",
    "check_key",
    "find_studies",
    "scanned_people",
    "source_key",
    "write_key",
]
