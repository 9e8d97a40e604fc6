"""The sizes of a MiniMind-V model, in one small object that imports no torch.

    LMConfig()                            27 M: 512 wide, 8 layers
    LMConfig(dim=768, n_layers=16)       109 M
    LMConfig(vision_dim=0)               the language model alone, without eyes
"""
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class LMConfig:
    """Sizes of the network; field names are those of MiniMind v1 and Llama.

    Raises ValueError with every inconsistent size at once.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 8              # grouped-query attention: so many key/value heads serve all query heads
    vocab_size: int = 6400
    hidden_dim: int = 0              # feed-forward width; 0 = 2/3 of 4 * dim, rounded up to multiple_of
    multiple_of: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 512           # the longest prompt + answer, in tokens
    vision_dim: int = 768            # width of image features (CLIP ViT-B/32: 768); 0 = no vision projection
    num_image_tokens: int = 50       # per image: 7 * 7 patches + the class token for ViT-B/32 at 224 pixels
    vision_proj_bias: bool = False   # True only for v1's released VLM files, which carry one

    def __post_init__(self):
        if not self.hidden_dim and self.multiple_of > 0:
            self.hidden_dim = self.multiple_of * -(-int(8 * self.dim / 3) // self.multiple_of)
        problems = [f"{name} must be at least 1, not {getattr(self, name)}"
                    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim",
                                 "multiple_of", "max_seq_len", "num_image_tokens")
                    if getattr(self, name) < 1]
        if self.vision_dim < 0:
            problems.append(f"vision_dim must be 0 or more, not {self.vision_dim}")
        if not problems:
            if self.dim % self.n_heads:
                problems.append(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            elif self.head_dim % 2:
                problems.append(f"dim / n_heads = {self.head_dim} is odd, but rotary embeddings turn pairs")
            if self.n_heads % self.n_kv_heads:
                problems.append(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if problems:
            raise ValueError("model sizes do not fit: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "LMConfig":
        """Build from a dict, ignoring keys of other programs (a Hugging Face config.json holds many)."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "LMConfig":
        return cls.from_dict(json.loads(Path(path).read_text()))
