"""Write adapters in PEFT's formats and read them. No other part of lrkit knows those formats.

`export` writes a trained model for those who do not use lrkit, and reads it back to see that nothing was lost.
`push_to_hub` uploads that with a model card. `from_peft` attaches an adapter that PEFT trained. Only `export` needs PEFT:
to read its own file back.

A low-rank adapter is any module that offers ``export_factors`` (out) and ``import_factors`` (in), as `LowRank` does.
"""

from lrkit.peft.exporting import TOLERANCE, Exported, export
from lrkit.peft.formats import TARGETS
from lrkit.peft.hub import Pushed, push_to_hub
from lrkit.peft.importing import from_peft

__all__ = ["TARGETS", "TOLERANCE", "Exported", "Pushed", "export", "from_peft", "push_to_hub"]
