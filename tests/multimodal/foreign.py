"""Tiny random models in folders, made with the libraries' own classes and `save_pretrained`, as others would have made them."""

from __future__ import annotations

import string

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH, WIDTH = 16, 32


def tokenizer(folder):
    """CLIP's, with letters and a few pieces of words for a vocabulary."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = CLIPTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d</w>")], model_max_length=LENGTH)
    made.save_pretrained(folder / "tokenizer")
    return made


def text_config(made, **more):
    return CLIPTextConfig(
        vocab_size=len(made), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id, **more,
    )  # fmt: skip


def stable_diffusion(folder, scheduler=None):
    """A pipeline of latents 8x8 and pictures 16x16, saved into `folder`."""
    torch.manual_seed(0)
    made = tokenizer(folder)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, cross_attention_dim=WIDTH, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config(made)), tokenizer=made, unet=unet, vae=vae,
        scheduler=scheduler or pndm(), safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def pndm():
    """The scheduler that Stable Diffusion is published with."""
    return diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def unclip_scheduler(**more):
    return diffusers.UnCLIPScheduler(num_train_timesteps=1000, **more)


def prior():
    torch.manual_seed(1)
    made = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=LENGTH,
        additional_embeddings=4,
    )  # fmt: skip
    made.clip_std.data.fill_(0.5)  # both statistics are zero at first
    made.clip_mean.data.normal_()
    return made


def kandinsky(folder):
    """Two pipelines, saved into `folder`/prior and `folder`/decoder: pictures 16x16."""
    torch.manual_seed(2)
    made = tokenizer(folder)
    eye = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=WIDTH,
    )  # fmt: skip
    diffusers.KandinskyV22PriorPipeline(
        prior=prior(), image_encoder=transformers.CLIPVisionModelWithProjection(eye), tokenizer=made,
        text_encoder=transformers.CLIPTextModelWithProjection(text_config(made, projection_dim=WIDTH)),
        scheduler=unclip_scheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=transformers.CLIPImageProcessor(
            crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}
        ),
    ).save_pretrained(folder / "prior")  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH, cross_attention_dim=16, block_out_channels=(16, 32), layers_per_block=1, sample_size=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        out_channels=3, up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), vq_embed_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample_range=2.0, steps_offset=1
    )
    diffusers.KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(folder / "decoder")
    return folder / "prior", folder / "decoder"


def unclip(folder):
    """A pipeline of pictures 16x16, enlarged to 32x32, saved into `folder`; diffusers itself no longer loads one."""
    torch.manual_seed(3)
    made = tokenizer(folder)
    up = {
        "sample_size": 32, "layers_per_block": 1, "block_out_channels": (16, 32), "in_channels": 6, "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "norm_num_groups": 8, "add_attention": False,
    }  # fmt: skip
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=16, clip_extra_context_tokens=4
    )
    projection.learned_classifier_free_guidance_embeddings.data.normal_()
    decoder = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=16, class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    pipe = UnCLIPPipeline(
        prior=prior(), decoder=decoder, tokenizer=made, text_proj=projection,
        text_encoder=transformers.CLIPTextModelWithProjection(text_config(made, projection_dim=WIDTH)),
        super_res_first=diffusers.UNet2DModel(**up), super_res_last=diffusers.UNet2DModel(**up),
        prior_scheduler=unclip_scheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=unclip_scheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=unclip_scheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def deepfloyd(folder):
    """Two pipelines, saved into `folder`/base and `folder`/upsampler: pictures 16x16 and 32x32."""
    torch.manual_seed(4)
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    made = transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(made), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    encoder = transformers.T5EncoderModel(config)
    unet = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": WIDTH,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "encoder_hid_dim": WIDTH,
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 4,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "out_channels": 6, "resnet_time_scale_shift": "scale_shift",
    }  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
        variance_type="learned_range",
    )  # fmt: skip
    common = {
        "tokenizer": made, "text_encoder": encoder, "scheduler": scheduler, "safety_checker": None, "watermarker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    base = diffusers.UNet2DConditionModel(sample_size=16, in_channels=3, **unet)
    diffusers.IFPipeline(unet=base, **common).save_pretrained(folder / "base")
    larger = diffusers.UNet2DConditionModel(sample_size=32, in_channels=6, class_embed_type="timestep", **unet)
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.IFSuperResolutionPipeline(unet=larger, image_noising_scheduler=noising, **common).save_pretrained(
        folder / "upsampler"
    )
    return folder / "base", folder / "upsampler"
