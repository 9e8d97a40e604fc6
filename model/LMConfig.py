"""The sizes of a MiniMind-V model, in one small object that imports no torch.

LMConfig()                            27 M: 512 wide, 8 layers
LMConfig(dim=768, n_layers=16)       109 M
LMConfig(vision_dim=0)               the language model alone, without eyes
LMConfig(use_moe=True)                96 M, of which a token uses 62 M: a mixture of experts
"""

import math
from dataclasses import asdict, dataclass, fields

EXPERT_FIELDS = (
    "use_moe",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "aux_loss_alpha",
    "norm_topk_prob",
)
# Those of language models of other makes; not in the description of a model that has MiniMind's values.
OTHER_FIELDS = ("head_dim", "qk_norm", "tied", "open_id", "close_id")

# The largest that makes sense. What is larger comes from a damaged file or a slip of the finger, and would
# fill the memory before anybody is told.
LARGEST = {
    "dim": 65_536,
    "n_layers": 1_000,
    "n_heads": 4_096,
    "n_kv_heads": 4_096,
    "vocab_size": 1_000_000,
    "hidden_dim": 1_000_000,
    "head_dim": 65_536,
    "open_id": 1_000_000,
    "close_id": 1_000_000,
    "multiple_of": 65_536,
    "max_seq_len": 1_048_576,
    "vision_dim": 65_536,
    "num_image_tokens": 65_536,
    "n_routed_experts": 1_024,
    "num_experts_per_tok": 1_024,
    "rope_theta": 1e12,
    "aux_loss_alpha": 1e3,
}
MAX_PARAMETERS = 20_000_000_000  # 80 GB in float32


@dataclass
class LMConfig:
    """Sizes of the network; field names are those of MiniMind v1 and Llama.

    Raises ValueError with every inconsistent size at once.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 8  # grouped-query attention: so many key/value heads serve all query heads
    vocab_size: int = 6400
    hidden_dim: int = 0  # feed-forward width; 0 = 2/3 of 4 * dim, rounded up to multiple_of
    multiple_of: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 512  # the longest prompt + answer, in tokens
    vision_dim: int = 768  # width of image features (CLIP ViT-B/32: 768); 0 = no vision projection
    num_image_tokens: int = 50  # per image: 7 * 7 patches + the class token for ViT-B/32 at 224 pixels
    vision_proj_bias: bool = False  # True only for v1's released VLM files, which carry one
    use_moe: bool = False  # several feed-forwards (experts) per layer, of which a token uses a few
    n_routed_experts: int = 4  # experts to choose from, each as wide as the one of a dense model
    num_experts_per_tok: int = 2  # how many of them a token chooses
    n_shared_experts: int = 1  # one more that every token uses, or 0
    aux_loss_alpha: float = 0.01  # weight of the loss that keeps the experts evenly used; 0 = without
    norm_topk_prob: bool = True  # the weights of a token's chosen experts add up to 1
    head_dim: int = 0  # 0 = dim / n_heads
    qk_norm: bool = False  # queries and keys of every head are normed (Qwen3)
    tied: bool = True  # the output matrix is that of the embeddings
    open_id: int = 30  # an image's placeholder is made of these: "<" and ">" in MiniMind's vocabulary
    close_id: int = 32

    def __post_init__(self):
        problems = self.wrong_types()
        if problems:  # nothing can be computed of them
            raise ValueError("model sizes do not fit: " + "; ".join(problems))
        if not self.hidden_dim and self.multiple_of > 0:
            self.hidden_dim = self.multiple_of * -(-(8 * self.dim // 3) // self.multiple_of)
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in (
                "dim",
                "n_layers",
                "n_heads",
                "n_kv_heads",
                "vocab_size",
                "hidden_dim",
                "multiple_of",
                "max_seq_len",
                "num_image_tokens",
            )
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be 0 or more, not {getattr(self, name)}"
            for name in ("vision_dim", "aux_loss_alpha", "head_dim", "open_id", "close_id")
            if getattr(self, name) < 0
        ]
        problems += [
            f"{name} must be at most {most:,.0f}, not {str_of(getattr(self, name))}"
            for name, most in LARGEST.items()
            if getattr(self, name) > most
        ]
        if not 0 < self.norm_eps < 1:
            problems.append(f"norm_eps must lie between 0 and 1, not {self.norm_eps}")
        if not self.rope_theta >= 1:
            problems.append(f"rope_theta must be at least 1, not {self.rope_theta}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            problems.append(
                f"num_experts_per_tok must be 1 to n_routed_experts ({self.n_routed_experts}), "
                f"not {self.num_experts_per_tok}"
            )
        if self.n_shared_experts not in (0, 1):
            problems.append(f"n_shared_experts must be 0 or 1, not {self.n_shared_experts}")
        if not problems:
            if self.dim % self.n_heads and not self.head_dim:
                problems.append(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            self.head_dim = self.head_dim or self.dim // self.n_heads
            if self.head_dim % 2:
                problems.append(f"head_dim = {self.head_dim} is odd, but rotary embeddings turn pairs")
            if self.n_heads % self.n_kv_heads:
                problems.append(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
            if (number := self.num_parameters()) > MAX_PARAMETERS:
                problems.append(f"that makes {number:,} parameters, at most {MAX_PARAMETERS:,} are read")
        if problems:
            raise ValueError("model sizes do not fit: " + "; ".join(problems))

    def wrong_types(self) -> list[str]:
        """What is no number of the kind that it must be: 512.5, "512", true, NaN."""
        problems = []
        for one in fields(self):
            value, kind = getattr(self, one.name), type(one.default)
            is_right = type(value) is kind or (kind is float and type(value) is int and value < 1 << 63)
            if not is_right or (kind is float and not math.isfinite(value)):
                words = {int: "a whole number", float: "a finite number", bool: "true or false"}
                problems.append(f"{one.name} must be {words[kind]}, not {str_of(value)}")
        return problems

    def num_parameters(self) -> int:
        """Roughly: the matrices."""
        num_experts = self.n_routed_experts + self.n_shared_experts if self.use_moe else 1
        head_dim = self.head_dim or self.dim // self.n_heads
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * head_dim
        block = attention + 3 * self.dim * self.hidden_dim * num_experts
        return self.n_layers * block + self.dim * ((2 - self.tied) * self.vocab_size + self.vision_dim)

    @property
    def placeholder(self) -> tuple[int, int]:
        return self.open_id, self.close_id

    def to_dict(self) -> dict:
        """All sizes; those of experts only where there are experts, OTHER_FIELDS only where they are not
        MiniMind's."""
        usual = {name: getattr(LMConfig, name) for name in OTHER_FIELDS}
        usual["head_dim"] = self.dim // self.n_heads
        return {
            name: value
            for name, value in asdict(self).items()
            if (self.use_moe or name not in EXPERT_FIELDS) and (name not in usual or usual[name] != value)
        }

    @classmethod
    def from_dict(cls, values: dict) -> "LMConfig":
        """Build from a dict, ignoring keys of other programs (a Hugging Face config.json holds many)."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in values.items() if name in known and value is not None}
        if isinstance(values.get("n_shared_experts"), bool):  # as v1 wrote it
            values["n_shared_experts"] = int(values["n_shared_experts"])
        return cls(**values)


def str_of(value: object) -> str:
    """For a message, whatever a file holds in the place of a number."""
    try:
        return repr(value)[:40]
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in a list
        return f"a {type(value).__name__}"
