"""Small models of the kinds that are neither BERT nor Llama: mixtures, state spaces, vision, speech, two towers."""

import warnings

import torch
import transformers

import lrkit

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _SIZES | _TEXT | {"num_key_value_heads": 2}
_VISION = _SIZES | {"image_size": 32, "patch_size": 8}


def _make(kind, config, **settings):
    return getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**settings))


def _two_towers(kind):
    return _make(kind, "Siglip", text_config=_SIZES | {"vocab_size": 64}, vision_config=_VISION)


def llava():
    return _make(
        "LlavaForConditionalGeneration",
        "Llava",
        text_config=transformers.LlamaConfig(**_DECODER),
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
        image_token_id=63,
    )


def detr():
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 1, "ffn_dim": 48, "attention_heads": 4}.items()}  # fmt: skip
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    return _make("DetrForObjectDetection", "Detr", d_model=32, **sizes, backbone_config=backbone)


_MODERN = _SIZES | _TEXT | {"cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "eager"}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}

ZOO = {
    "qwen3-moe": lambda: _make(
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        **_DECODER,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "mixtral": lambda: _make("MixtralForCausalLM", "Mixtral", **_DECODER, num_local_experts=4),
    "gpt-oss": lambda: _make("GptOssForCausalLM", "GptOss", **_DECODER, head_dim=8, num_local_experts=4),
    "llama4": lambda: _make(
        "Llama4ForCausalLM", "Llama4Text", **_DECODER, intermediate_size_mlp=48, head_dim=8, num_local_experts=4
    ),
    "mamba": lambda: _make("MambaForCausalLM", "Mamba", **_TEXT, hidden_size=32, num_hidden_layers=2, state_size=8),
    "jamba": lambda: _make(
        "JambaForCausalLM",
        "Jamba",
        **_DECODER,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "xlnet": lambda: _make(
        "XLNetForSequenceClassification", "XLNet", **_TEXT, d_model=32, n_layer=2, n_head=4, d_inner=48
    ),
    "modernbert": lambda: _make("ModernBertForSequenceClassification", "ModernBert", **_MODERN),
    "modernbert-mlm": lambda: _make("ModernBertForMaskedLM", "ModernBert", **_MODERN),
    "wav2vec2": lambda: _make(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2",
        **_SIZES,
        conv_dim=(16, 16),
        conv_kernel=(4, 2),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "swin": lambda: _make(
        "SwinForImageClassification",
        "Swin",
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        image_size=32,
        window_size=4,
    ),
    "convnext": lambda: _make(
        "ConvNextForImageClassification", "ConvNext", depths=[1, 1], hidden_sizes=[8, 16], num_stages=2
    ),
    "siglip": lambda: _two_towers("SiglipModel"),
    "siglip-classifier": lambda: _two_towers("SiglipForImageClassification"),
    "detr": detr,
    "llava": llava,
    "gpt2-lm": lambda: _make("GPT2LMHeadModel", "GPT2", **_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "llama-lm": lambda: _make("LlamaForCausalLM", "Llama", **_DECODER, tie_word_embeddings=True),
    "gemma-lm": lambda: _make("GemmaForCausalLM", "Gemma", **_DECODER, head_dim=8, tie_word_embeddings=True),
    "t5-lm": lambda: _make("T5ForConditionalGeneration", "T5", **_T5, pad_token_id=0, decoder_start_token_id=0),
    "bert-alone": lambda: _make("BertModel", "Bert", **_SIZES, vocab_size=64),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    return ZOO[name]()


IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def said(call):
    """What a call gives, and all that lrkit warns of in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, " ".join(str(w.message) for w in caught if issubclass(w.category, lrkit.LrkitWarning))


def pooler_rank(rank, init, folder):
    """One of two processes (of a module that a new process can import) that train a BERT alone by mean pooling."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    for named in (False, True):
        model = make("bert-alone")
        adapted = lrkit.attach(
            model, lrkit.methods.adalora(rank=4, target_rank=2), train_also=["pooler"] if named else "auto"
        )
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
        adapted.bind(optimizer, total_steps=4)
        error = ""
        try:
            for _ in range(4):
                ids = torch.randint(0, 64, (2, 8))
                (ddp(input_ids=ids).last_hidden_state.mean(1).pow(2).mean() + adapted.penalty()).backward()
                optimizer.step()
                optimizer.zero_grad()
        except lrkit.LrkitError as told:
            error = str(told)
        torch.save((error, adapted.step), f"{folder}/{rank}-{named}")
    dist.destroy_process_group()


def fsdp_rank(_, init, folder):
    """One process that wraps an adapted BERT in FSDP, and keeps its state dicts before and after one that it loads."""
    import copy

    import models
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    warnings.simplefilter("ignore")
    model = models.make("bert")
    lrkit.attach(model, lrkit.methods.lora(rank=2))
    plain = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    wrapped.load_state_dict(
        {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    )
    after = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    plain.load_state_dict(before, strict=True)
    torch.save((before, after, plain.state_dict()), folder / "states")
    dist.destroy_process_group()
