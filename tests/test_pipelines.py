"""What pipelines.py says of each pipeline, against diffusers itself; and how a call of one is read."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import diffusers
import more_pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import CASES, adapters, packed, transformers, unets
from tiny_pipelines.case import generators, pictures

from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.guard.conditioning import conditioning_follows
from moe_artifacts.guard.pipelines import REFUSED, SPECS, spec_of
from moe_artifacts.guard.request import denoiser_of, read_request
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import SchedulerTap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers and torch, about themselves
ALL_CASES = CASES | {case.name: case for case in more_pipelines.CASES}
NEED_SENTENCEPIECE = ("KolorsPipeline", "KolorsImg2ImgPipeline")  # stand-ins for these say nothing of their modules
REFUSED_CASES = ("union", "blended")
LEAVING = {0: [0, 1, 3], 2: [1]}  # step -> which of the living rows go on after it: 4, 3, 1 images
LEFT = 1  # the image that stays to the end


def run(name: str, leaving: dict[int, list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Images of a hand-driven run of four, and with how many rows each call of the denoiser computed."""
    case = ALL_CASES[name]
    pipe = case.pipe()
    call = case.call(4, tuple(case.guidance)[-1])
    spec = spec_of(pipe)
    rows = LiveRows(read_request(pipe, spec, (), call, None).batch_size, loop_keeps_all=spec.keeps_batch)
    counts: list[int] = []

    def observe(step: Any) -> torch.Tensor | None:
        return torch.tensor(leaving[step.index]) if step.index in leaving else None

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.append(len(args[0] if args else kwargs["hidden_states"]))

    torch.manual_seed(0)  # some draw the latents of a control image without a generator
    with (
        SchedulerTap(pipe.scheduler, observe, rows),
        conditioning_follows(rows, spec.modules(pipe), spec),
        denoiser_of(pipe).register_forward_pre_hook(count, with_kwargs=True),
    ):
        images = pipe(**call).images
    return torch.as_tensor(images), counts


# Those of tiny_pipelines run through the guard in test_compatible.py.
SHRINKING = [
    pytest.param(name, marks=[pytest.mark.slow] if name in CASES else [])
    for name, case in ALL_CASES.items()
    if not name.endswith(REFUSED_CASES)
]


@pytest.mark.parametrize("name", SHRINKING)
def test_the_rows_of_a_shrinking_run_are_those_of_the_full_run(name):
    full, counts = run(name, {})
    part, fewer = run(name, LEAVING)
    assert (full[0] - full[1]).abs().max() > 0.01, "images alike would hide a row taken from the wrong place"
    torch.testing.assert_close(part, full[[LEFT]], atol=1e-5, rtol=0)  # other batch sizes sum in another order
    assert len(fewer) == len(counts)
    assert fewer[0] == counts[0]
    assert fewer[-1] * 4 == counts[-1], "the denoiser must be spared the rows that have left"


@pytest.mark.slow
def test_every_supported_pipeline_is_run_above():
    assert {type(case.build()).__name__ for case in ALL_CASES.values()} >= set(SPECS)


def test_the_names_are_those_of_diffusers():
    assert not SPECS.keys() & REFUSED.keys()
    for name in SPECS.keys() | REFUSED.keys():
        assert hasattr(diffusers, name), name


@pytest.mark.parametrize("name", [name for name in SPECS if name not in NEED_SENTENCEPIECE])
def test_the_inputs_are_parameters_of_the_modules(name):
    """A misspelt name would cut nothing."""
    spec, kind = SPECS[name], getattr(diffusers, name)
    parts = inspect.signature(kind.__init__).parameters
    parameters = set()
    for part in (spec.denoiser, *spec.also):
        annotation = parts[part].annotation
        for module in get_args(annotation) or (annotation,):
            if hasattr(module, "forward"):
                parameters |= set(inspect.signature(module.forward).parameters)
    assert {input_.partition(".")[0] for input_ in spec.batched | spec.shared} <= parameters
    assert not spec.batched & spec.shared
    assert spec.listed <= spec.batched


def test_a_loop_that_keeps_its_batch_has_its_latents_cut():
    for spec in SPECS.values():
        if spec.keeps_batch:
            assert spec.batched & {"sample", "hidden_states", "x"}


class Mine(StableDiffusionPipeline):
    """May have another loop."""


def as_class(name: str) -> Any:
    """An object that is nothing but an instance of a pipeline class of diffusers."""
    kind = type(name, (), {})
    kind.__module__ = "diffusers.pipelines"
    return kind()


@pytest.mark.parametrize(
    ("pipe", "told"),
    [
        (Mine.__new__(Mine), r"pipe is a Mine; the guard supports the pipelines StableDiffusion, .*Flux, .*subclasses"),
        (as_class("ShapEPipeline"), "pipe is a ShapEPipeline; the guard supports"),
        (object(), "pipe is a object; the guard supports"),
        (as_class("FluxInpaintPipeline"), "cannot watch a FluxInpaintPipeline: its loop blends the latents"),
        (as_class("StableDiffusionPAGPipeline"), "takes the perturbed attention out of its denoiser after the loop"),
        (as_class("IFPipeline"), "denoises pixels"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(pipe, told):
    with pytest.raises(UnsupportedPipelineError, match=told):
        spec_of(pipe)


def test_inpainting_needs_a_denoiser_that_takes_the_mask():
    """With four channels the loop itself blends in the image given: also after the last step, at the full batch."""
    kind = diffusers.StableDiffusionInpaintPipeline
    assert spec_of(unets.stable_diffusion(kind, unet=unets.unet(in_channels=9))).keeps_batch
    with pytest.raises(UnsupportedPipelineError, match="whose denoiser takes 4 channels: its loop blends"):
        spec_of(unets.stable_diffusion(kind))


def test_the_union_controlnet_mixes_the_images_of_a_batch():
    """Why it is refused."""
    pipe = adapters._union_controlled()
    with pytest.raises(UnsupportedPipelineError, match="attends across the images of the batch"):
        spec_of(pipe)
    added = {"text_embeds": torch.zeros(2, unets.POOLED), "time_ids": torch.zeros(2, 6)}
    given = {"control_type": torch.eye(6)[[1, 1]], "control_type_idx": [1], "added_cond_kwargs": added}

    def first_row(neighbour: float) -> torch.Tensor:
        control = pictures(2)
        control[1] *= neighbour
        embeds = torch.zeros(2, unets.TOKENS, unets.WIDTH)
        with torch.no_grad():
            down, _ = pipe.controlnet(torch.zeros(2, 4, 8, 8), 500, embeds, [control], return_dict=False, **given)
        return down[0][0]

    assert not torch.equal(first_row(0.0), first_row(1.0))


@pytest.mark.parametrize(
    ("name", "argument"),
    [("sdxl", "denoising_end"), ("flux2", "image"), ("sd", "cross_attention_kwargs"), ("sd", "output_type")],
)
def test_an_argument_that_cannot_be_followed_is_refused_by_name(name, argument):
    value = {"denoising_end": 0.8, "cross_attention_kwargs": {"gligen": {}}, "output_type": "gif"}.get(argument, 1)
    with pytest.raises(UnsupportedPipelineError, match=argument):
        read(name, **{argument: value})


def read(name: str, *, prompts: list[str] | None = None, **changes: Any) -> Any:
    pipe = ALL_CASES[name].pipe()
    call = ALL_CASES[name].call(2, tuple(ALL_CASES[name].guidance)[-1], **changes)
    return read_request(pipe, spec_of(pipe), (), call, prompts)


def test_a_lora_scale_and_adapter_masks_may_be_given():
    assert (
        read("sd", cross_attention_kwargs={"scale": 0.5, "ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}).batch_size == 2
    )
    with pytest.raises(UnsupportedPipelineError, match=r"joint_attention_kwargs \['ip_adapter_masks'\]"):
        read("flux", joint_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]})


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("sd", {}, (16, 16)),  # the denoiser's sample_size of 8, times the VAE's factor of 2
        ("sd", {"height": 32, "width": 48}, (32, 48)),
        ("sdxl", {"width": 32}, (16, 32)),
        ("sd-img2img", {}, (None, None)),
        ("sd-controlnet", {}, (None, None)),
        ("flux", {"height": None, "width": None}, (256, 256)),  # always 128, times 2
        ("flux-controlnet", {"height": None, "width": None}, (16, 16)),  # that of the control images
        ("z-image", {"height": None, "width": None}, (1024, 1024)),
        ("aura-flow", {"height": None, "width": 8}, (16, 8)),
        ("sana", {}, (32, 32)),
    ],
)
def test_the_size_is_the_one_given_or_the_default(name, changes, size):
    request = read(name, **changes)
    assert (request.height, request.width) == size


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("sd", {"guidance_scale": 4}, 4.0),
        ("flux", {"guidance_scale": 3.5, "true_cfg_scale": 1.0}, 3.5),
        ("flux", {"guidance_scale": 3.5, "true_cfg_scale": 2.0}, 2.0),
        ("qwen-image", {"true_cfg_scale": 4.0}, 4.0),
        ("qwen-image", {"true_cfg_scale": 4.0, "negative_prompt_embeds": None}, 1.0),
    ],
)
def test_the_guidance_is_that_of_two_calls_where_there_is_one(name, changes, scale):
    assert read(name, **changes).guidance_scale == scale


@pytest.mark.parametrize(
    ("name", "changes", "steps"),
    [
        ("sd", {"num_inference_steps": 7}, 7),
        ("sd", {"timesteps": [900, 500, 100]}, None),
        ("flux", {"sigmas": [1.0, 0.5]}, None),
        ("sd-img2img", {"strength": 0.5}, None),  # starts in the middle of a grid
        ("sd-img2img", {"strength": 1.0, "num_inference_steps": 7}, 7),
    ],
)
def test_the_number_of_steps_is_known_for_a_whole_grid_only(name, changes, steps):
    assert read(name, **changes).num_inference_steps == steps


@pytest.mark.parametrize(
    ("generator", "kind", "seeds"),
    [
        (None, "none", [None, None]),
        (torch.Generator().manual_seed(3), "single", [None, None]),
        (generators(2, first_seed=7), "list", [7, 8]),
    ],
)
def test_a_seed_is_known_for_a_generator_of_ones_own(generator, kind, seeds):
    request = read("sd", generator=generator)
    assert (request.generator_kind, request.seeds) == (kind, seeds)


def test_prompts_may_stand_for_a_list_of_embeddings_of_different_lengths():
    request = read("z-image", prompts=["a boot", "a bag"], num_images_per_prompt=2)
    assert request.prompts == ["a boot", "a boot", "a bag", "a bag"]
    assert request.batch_size == 4
    with pytest.raises(InputError, match="prompts has 1 entries, expected 2"):
        read("z-image", prompts=["a boot"])


def test_positional_arguments_and_a_tuple_as_result_are_read():
    pipe = unets.stable_diffusion()
    request = read_request(pipe, spec_of(pipe), (["a", "b"], 32, 48, 5), {"return_dict": False}, None)
    assert (request.prompts, request.height, request.width, request.num_inference_steps) == (["a", "b"], 32, 48, 5)
    assert not request.return_dict


def test_the_denoiser_is_the_module_whose_calls_are_saved():
    pipe = transformers.stable_diffusion_3()
    assert denoiser_of(pipe) is pipe.transformer
    assert spec_of(pipe).modules(pipe) == [pipe.transformer]
    pipe = packed.flux()
    assert denoiser_of(pipe) is pipe.transformer
    pipe = CASES["sd-controlnet"].pipe()
    assert spec_of(pipe).modules(pipe) == [pipe.unet, pipe.controlnet]


def test_runge_kutta_steps_that_begin_within_the_grid_are_refused_before_the_denoiser_is_called():
    case = CASES["sd-img2img"]
    pipe = case.pipe("pndm-prk")
    pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("the denoiser was called"))
    asked = case.call(2, next(iter(case.guidance)))
    with pytest.raises(UnsupportedPipelineError, match=r"skip_prk_steps=False cannot begin within its grid"):
        read_request(pipe, spec_of(pipe), (), asked, None)
    assert read_request(pipe, spec_of(pipe), (), asked | {"strength": 1.0}, None).batch_size == 2
