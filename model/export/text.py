"""What turns text into ids in an exported folder: tokenizer, chat template, processor.

They must make of a conversation what prompt.Renderer makes of it, to the id; compare_ids() holds them to it.
"""

import json

import tokenizers

from model.LMConfig import LMConfig
from model.prompt import IMAGE_MARK, Renderer, spare_tokens
from model.vision_utils import ImageProcessor

# The chat format of prompt.py in Jinja. As in our chat, images that a text does not mark itself go in front,
# one per line; a text that is one string keeps its marks. {% generation %} shows TRL what an answer is.
TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set found = namespace(text='', images=0) -%}
{%- if content is string -%}
{%- set found.text = content -%}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- set found.text = found.text + part['text'] -%}
{%- else -%}
{%- set found.images = found.images + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- if found.text.count('<image>') != found.images -%}
{%- set found.text = '<image>\\n' * found.images + found.text.replace('<image>', '') -%}
{%- endif -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{{ found.text }}
{%- elif message['role'] == 'user' -%}
{{ 'BOSuser\\n' + found.text + 'EOS\\n' }}
{%- else -%}
{{ 'BOSassistant\\n' }}{%- generation -%}{{ found.text + 'EOS' }}{%- endgeneration -%}{{ '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'BOSassistant\\n' }}
{%- endif -%}
"""
SAMPLES = (  # conversations that compare_ids() renders both ways
    [{"from": "human", "value": f"{IMAGE_MARK}\nWhat is this?"}],
    [
        {"from": "system", "value": "You see."},
        {"from": "human", "value": f"这是 {IMAGE_MARK} 和 {IMAGE_MARK}，\n\n有什么不同？ "},
        {"from": "gpt", "value": "  A red circle, 12.5 % larger. 它是<蓝色>。"},
        {"from": "human", "value": " Where?\tHow many?"},
    ],
)


def chat_template(bos_token: str, eos_token: str, for_training: bool = True) -> str:
    """for_training: with the marks that show what an answer is; only transformers knows them"""

    def quoted(token: str) -> str:
        return token.replace("\\", "\\\\").replace("'", "\\'")

    template = TEMPLATE
    if not for_training:
        template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return template.replace("BOS", quoted(bos_token)).replace("EOS", quoted(eos_token))


def choose_image_token(tokenizer) -> int:
    """The id that can stand for one of an image's places: a special token that neither text nor template
    ever makes, "<unk>" if that is one. Raises ValueError if there is none."""
    if not (spare := spare_tokens(tokenizer)):
        raise ValueError(
            "the tokenizer has no special token to spare that could stand for an image's places, as LLaVA "
            "needs: --to llama exports the language model alone"
        )
    return spare[-1]


def tokenizer_json(tokenizer, image_id: int | None = None) -> dict:
    """tokenizer.json: nothing is put around a text, for the template does that; the token `image_id` is
    called <image>."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["post_processor"] = None
    if image_id is None:
        return parts
    vocabulary, name = parts["model"]["vocab"], tokenizer.backend_tokenizer.id_to_token(image_id)
    if isinstance(vocabulary, dict) and vocabulary.get(IMAGE_MARK, image_id) != image_id:
        raise ValueError(f"the tokenizer has a token {IMAGE_MARK} that is a word like any other")
    if isinstance(vocabulary, dict):
        parts["model"]["vocab"] = {
            IMAGE_MARK if number == image_id else token: number for token, number in vocabulary.items()
        }
    elif image_id < len(vocabulary):  # of Unigram: [[token, score], ...]
        vocabulary[image_id][0] = IMAGE_MARK
    for token in parts["added_tokens"]:
        if token["id"] == image_id:
            token["content"] = IMAGE_MARK
    if parts["model"].get("unk_token") == name:
        parts["model"]["unk_token"] = None  # never needed, see choose_image_token()
    return parts


def tokenizer_config(tokenizer, max_seq_len: int, with_images: bool) -> dict:
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.eos_token,
        "padding_side": "left",
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if with_images:
        return values | {
            "extra_special_tokens": {"image_token": IMAGE_MARK},
            "processor_class": "LlavaProcessor",
        }
    return values | ({"unk_token": tokenizer.unk_token} if tokenizer.unk_token else {})


def image_processor_config(processor: ImageProcessor) -> dict:
    """Squashed to a square, not cropped, as get_img_process() does it."""
    side = {"height": processor.size, "width": processor.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


def processor_config(patch_size: int) -> dict:
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "num_additional_image_tokens": 1,  # the class token
        "vision_feature_select_strategy": "full",
        "image_token": IMAGE_MARK,
    }


def compare_ids(tokenizer, exported: dict, config: LMConfig, image_id: int | None) -> None:
    """Raise ValueError unless the exported tokenizer.json makes of SAMPLES, written out as the template does,
    the ids that our Renderer makes; its placeholders become LLaVA's image tokens."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(exported))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    frames = {"system": "{}", "human": f"{bos}user\n{{}}{eos}\n", "gpt": f"{bos}assistant\n{{}}{eos}\n"}
    for turns in SAMPLES:
        if image_id is None:
            turns = [turn | {"value": turn["value"].replace(IMAGE_MARK, "")} for turn in turns]
        prompt = Renderer(tokenizer, config.num_image_tokens, placeholder=config.placeholder).render(turns)
        ours = list(prompt.input_ids)
        for position in (position for slots in prompt.image_slots for position in slots):
            ours[position] = image_id
        text = "".join(frames[turn["from"]].format(turn["value"]) for turn in turns) + f"{bos}assistant\n"
        theirs = backend.encode(text.replace(IMAGE_MARK, IMAGE_MARK * config.num_image_tokens)).ids
        if ours != theirs:
            raise ValueError(
                "the tokenizer cannot be exported: in transformers it makes other ids of a conversation"
            )
