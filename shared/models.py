"""The vocabulary of models: what every service may need to know of one."""

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A served model. ``path`` is a local checkpoint folder; the modelled engine needs none and
    then speaks the built-in byte-level tokenizer. ``profile`` names the model in the cost profiles
    (shared/cost/profiles), with a folder before it (``FOLDER/NAME``) in that folder's; empty: as
    ``model_id``."""

    model_id: str
    path: str = ""
    context_tokens_max: int = 4096
    profile: str = ""

    @property
    def profile_name(self) -> str:
        return self.profile or self.model_id
