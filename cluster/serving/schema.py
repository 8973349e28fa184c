"""What may be asked of the server: OpenAI's Images API and embeddings, and what Oneira adds. Pydantic models with limits.

Every field is checked here, before anything is allocated. A model is refused as a whole at its first wrong field. JSON is
read strictly ("5" is no number); fields of forms are text, and are read as what they should be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_PICTURES = 10
MAX_PROMPT = 1000  # characters, as OpenAI's own models of this design
MAX_STEPS = 250
MAX_FRAMES = 16
MAX_TEXTS = 256
MAX_SAMPLES = 64
SEEDS = 2**63
DEADLINE = "X-Deadline-Ms"
MAX_DEADLINE = 3_600_000  # milliseconds


def _clean(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    strange = next((c for c in text if (ord(c) < 32 and c not in "\t\n\r") or ord(c) == 127), None)
    if strange is not None:
        raise ValueError(f"it has the control character U+{ord(strange):04X}")
    return text


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT), AfterValidator(_clean)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _Pictures(_Asked):
    """What all requests for pictures share. `seed`, `steps` and `guidance` are Oneira's; None is the model's own."""

    model: str | None = Field(None, max_length=200, description="One of /v1/models; by default the first.")
    n: int | None = Field(None, ge=1, le=MAX_PICTURES)
    size: str | None = Field(None, max_length=20, description="WxH that the model makes, or 'auto': its largest.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    seed: int | None = Field(
        None, ge=0, lt=SEEDS, description="Picture i of a request has seed + i; by default random."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=50)
    user: str | None = Field(None, max_length=512, description="Not kept.")


class _Streamed(_Pictures):
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Pictures on the way, in a stream.")
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None


class Generation(_Streamed):
    """POST /v1/images/generations."""

    prompt: Prompt


class Edit(_Streamed):
    """POST /v1/images/edits: the fields of its form besides `image` and `mask`."""

    prompt: Prompt


class Variation(_Pictures):
    """POST /v1/images/variations: the fields of its form besides `image`."""


class Interpolation(_Pictures):
    """POST /v1/images/interpolations: pictures on the way between two prompts or pictures. A picture is a data: URL."""

    model_config = ConfigDict(validate_by_name=False)

    n: Literal[1] | None = None
    start: str = Field(alias="from", min_length=1, max_length=12_000_000)
    end: str = Field(alias="to", min_length=1, max_length=12_000_000)
    frames: int = Field(8, ge=2, le=MAX_FRAMES)


class Embedding(_Asked):
    """POST /v1/embeddings: of texts, by the model's CLIP."""

    input: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_TEXTS)]
    model: str = Field(max_length=200)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=65536, description="Only the model's own number.")
    user: str | None = Field(None, max_length=512, description="Not kept.")


class Params(_Asked):
    """Settings of a model's samples; each model has some of them."""

    temperature: float | None = Field(None, ge=0, le=10)
    top_k: int | None = Field(None, ge=0, le=100_000)
    top_p: float | None = Field(None, gt=0, le=1)
    beginning: str | None = Field(None, max_length=MAX_PROMPT, description="What each text begins with.")
    labels: int | Annotated[list[int], Field(min_length=1, max_length=MAX_SAMPLES)] | None = Field(
        None, description="Of all samples, or of each."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=50)
    sampler: Literal["ddpm", "ddim", "dpm++"] | None = None


class Sample(_Asked):
    """POST /v1/samples: of a generative model."""

    model: str | None = Field(None, max_length=200, description="One of /v1/models; by default the first that samples.")
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="The same seed and n give the same samples.")
    params: Params | None = None
    user: str | None = Field(None, max_length=512, description="Not kept.")


def body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a JSON body."""
    return _entry("application/json", _schema(model))


def form(model: type[BaseModel], files: dict[str, bool]) -> dict[str, Any]:
    """The OpenAPI entry of a form of this model and of these files, by name: whether it is required."""
    schema = _schema(model)
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = schema.get("required", []) + [name for name, needed in files.items() if needed]
    return _entry("multipart/form-data", schema)


def _entry(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    deadline = {
        "name": DEADLINE, "in": "header", "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE},
        "description": "Milliseconds within which the answer is of use; 429 as soon as it is known that they do not do.",
    }  # fmt: skip
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}, "parameters": [deadline]}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(by_alias=True)
