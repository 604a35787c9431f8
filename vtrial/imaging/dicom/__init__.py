"""PET/CT from DICOM: `studies.py` finds and reads studies, `suv.py` is the physics of SUV, the rest serves these."""
