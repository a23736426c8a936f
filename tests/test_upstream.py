"""diffusers' own test suites for schedulers and text-to-image pipelines, pointed at our classes.

They are not in its packages, so these run where a checkout of diffusers is at hand, and what its suites import:

    pip install parameterized requests-mock torchsde
    DIFFUSERS_SOURCE=/path/to/diffusers python -m pytest tests/test_upstream.py

Both generations of the pipeline suite run, each on a pipeline as the trainer builds it and on one of stock tiny parts, whose
scheduler has settings that ours refuses to keep. What is changed or left out says why.
"""

import os
import sys
import tempfile
import unittest
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if not SOURCE:
    pytest.skip("set DIFFUSERS_SOURCE to a checkout of diffusers", allow_module_level=True)
sys.path.insert(0, SOURCE)

from tests.pipelines import pipeline_params, test_pipelines_common, testing_utils  # noqa: E402
from tests.schedulers import test_scheduler_ddpm  # noqa: E402


class TestScheduler(test_scheduler_ddpm.DDPMSchedulerTest):
    """The suite of `DDPMScheduler`, its figures included: `SchedulerCommonTest` and the tests of DDPM itself."""

    scheduler_classes = (SfumatoDDPMScheduler,)

    def test_rescale_betas_zero_snr(self):
        """Upstream predicts epsilon here, which is undefined at zero terminal SNR and which we refuse."""
        for rescale in (True, False):
            self.check_over_configs(rescale_betas_zero_snr=rescale, prediction_type="v_prediction")

    def test_from_pretrained(self):
        """Ours keeps `_use_default_values`, empty: without it, a swap in memory to DEIS or Heun loses what was trained."""
        (cls,), config = self.scheduler_classes, self.get_scheduler_config()
        scheduler = cls(**config)
        with tempfile.TemporaryDirectory() as folder:
            scheduler.save_pretrained(folder)
            assert cls.from_pretrained(folder).config == scheduler.config


class Pipeline(SfumatoPipeline):
    """Ours opens no pickles, which these tests write for speed; here they write safetensors."""

    def save_pretrained(self, folder, safe_serialization=True, **kwargs):
        super().save_pretrained(folder, **kwargs)


def vae():
    """A tiny stock VAE."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )


def trained_parts(folder):
    """The components of a pipeline as the trainer builds it, with a VAE."""
    vae().save_pretrained(folder / "vae")
    torch.manual_seed(0)
    settings = {"vae": {"pretrained": str(folder / "vae")}, "data": {"resolution": 32}}
    return dict(tiny.pipeline(folder, **settings).components)


def stock_parts(folder):
    """Components as the suite of `StableDiffusionPipeline` builds them, in ours; the tokenizer alone is of ours."""
    tokenizer = tiny.pipeline(folder).tokenizer
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text_encoder = CLIPTextModel(text).eval()
    pipe = Pipeline(unet=unet, scheduler=scheduler, vae=vae(), text_encoder=text_encoder, tokenizer=tokenizer)
    return dict(pipe.components)


class Trained:
    """The parts as the trainer builds them."""

    parts = staticmethod(trained_parts)
    output_shape = (3, 32, 32)


class Stock:
    """Stock tiny parts."""

    parts = staticmethod(stock_parts)
    output_shape = (3, 64, 64)


class Suite:
    """What both generations of the suite ask for."""

    pipeline_class = Pipeline
    params = required_input_params_in_call_signature = pipeline_params.TEXT_TO_IMAGE_PARAMS
    batch_params = batch_input_params = pipeline_params.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = image_latents_params = pipeline_params.TEXT_TO_IMAGE_IMAGE_PARAMS
    callback_cfg_params = pipeline_params.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS

    @pytest.fixture(autouse=True)
    def _known(self, monkeypatch):
        monkeypatch.setattr(diffusers.pipelines, "Pipeline", Pipeline, raising=False)  # where one test looks it up

    def get_dummy_components(self, **ignored):
        with tempfile.TemporaryDirectory() as folder:
            return self.parts(Path(folder))


class OldSuite(
    Suite,
    test_pipelines_common.PipelineLatentTesterMixin,
    test_pipelines_common.PipelineKarrasSchedulerTesterMixin,
    test_pipelines_common.SDFunctionTesterMixin,
    test_pipelines_common.PipelineTesterMixin,
):
    """The suite of the first generation."""

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        return {"prompt": "a red circle", "generator": generator, "num_inference_steps": 2, "output_type": "np"}


class TestOldSuiteTrained(Trained, OldSuite, unittest.TestCase):
    pass


class TestOldSuiteStock(Stock, OldSuite, unittest.TestCase):
    pass


class NewSuite(Suite, testing_utils.BasePipelineTesterConfig, testing_utils.PipelineTesterMixin):
    """The suite of the second generation."""

    def get_dummy_inputs(self):
        return {
            "prompt": "a red circle",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "output_type": "pt",
        }


class TestNewSuiteTrained(Trained, NewSuite):
    pass


class TestNewSuiteStock(Stock, NewSuite):
    pass
