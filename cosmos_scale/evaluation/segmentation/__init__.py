"""Zero-shot segmentation: each pixel gets the class whose name is most like the image tower's patches there.

The way of a picture: `pixels.py` (bytes to the normalised, resized picture) -> `windows.py` (patches of all windows
against the classes' names, and their mean) -> `refine.py` (PAMR, where it is asked for) -> `labels.py` -> `overlap.py`
(counts of agreement with the true mask). `segmenter.py` joins these. Data: `layouts.py` (which pictures and masks),
`masks.py` (what a mask's numbers mean), `names.py` (what the classes are called). `evaluator.py` measures, and
`overlays.py` draws.
"""
