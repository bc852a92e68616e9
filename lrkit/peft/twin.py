"""The same adapters on a copy of the model."""

from torch import nn

from lrkit.adapt.adapted import Adapted


def twin(adapted: Adapted, plain: nn.Module) -> Adapted:
    """Attach what was trained to a copy of the model as it was before `attach`, and return its handle."""
    other = Adapted(plain, adapted.method, list(adapted.adapters), adapted.head, exact=True)
    other.load_state_dict(adapted.state_dict())
    return other
