import copy

import numpy as np
import pytest
import torch
from torch import nn

from callbacks import DifficultyRanking, EMATarget
from modules.bolt import BOLT
from modules.bolt.losses import cosine_consistency, info_nce, normalised_std
from modules.encoders import embed_tokens, encode_tokens
from tests.modules.toy_images import TINY, batch, batches, loader, quiet_trainer, silence


def tiny_bolt(**kwargs):
    torch.manual_seed(0)
    return BOLT(**{"encoder_options": TINY, "projector_hidden": 12, "projector_dim": 6, **kwargs})


def with_ranker(module):
    DifficultyRanking().setup(quiet_trainer(), module, "fit")
    return module


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes_of_heads_and_perturbation():
    with torch.device("meta"):
        module = BOLT(
            encoder="vit_base_patch16_224",
            encoder_options={},
            image_size=224,
            in_channels=3,
            projector_hidden=4096,
            projector_dim=256,
            pos_embed="learned",
        )
    assert parameters_of(module.online.encoder) == 85_798_656
    assert parameters_of(module.online.perturbation) == 590_592
    assert parameters_of(module.online.projector) == 4_206_848
    assert parameters_of(module.predictor) == 2_109_696
    assert parameters_of(module.target) == parameters_of(module.online)
    assert module.feature_dim == 768


def test_size_of_the_ranker_of_a_wide_encoder():
    with torch.device("meta"):
        head = DifficultyRanking(dim=768)
        module = tiny_bolt()
        head.setup(quiet_trainer(), module, "fit")
    assert parameters_of(module.auxiliary["rank"]) == 591_361


def test_defaults_are_for_digits():
    module = BOLT()
    assert module.extract_features(torch.randn(2, 1, 8, 8)).shape == (2, 64)
    assert module.online.projector(torch.randn(2, 64)).shape == (2, 128)
    assert module.online.encoder.patch_embed.num_patches == 16
    assert module.perturbation_strength == (0.0, 1.0)


def test_branches_have_the_same_names_and_start_equal():
    module = tiny_bolt()
    online, target = dict(module.online.named_parameters()), dict(module.target.named_parameters())
    assert list(online) == list(target)
    assert all(torch.equal(online[name], target[name]) for name in online)
    assert not any(parameter.requires_grad for parameter in target.values())


def separate_passes(module, views, permutation):
    """Losses and features from four passes, one per network and view."""
    size = len(views[0])

    def features(branch, view):
        tokens = embed_tokens(branch.encoder, views[view % len(views)])
        if permutation is not None:
            tokens, _ = branch.perturbation(tokens, permutation[view * size : (view + 1) * size])
        return encode_tokens(branch.encoder, tokens)

    online, target = [[features(branch, view) for view in (0, 1)] for branch in (module.online, module.target)]
    u = [module.predictor(module.online.projector(y)) for y in online]
    z = [module.target.projector(y) for y in target]
    loss = cosine_consistency(u[0], z[1]) + cosine_consistency(u[1], z[0])
    return loss, torch.cat(online), torch.cat(target)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("perturb", [True, False])
def test_one_pass_equals_four_separate_passes(views, perturb):
    module = silence(tiny_bolt(bn_per_view=True, perturb=perturb))
    reference = copy.deepcopy(module)
    data = batch(views=views)
    torch.manual_seed(5)
    permutation = module.sample_permutations(data.images)
    torch.manual_seed(5)
    seen = {}
    module._pairs = lambda online, target, _: seen.update(online=online, target=target) or [None]
    module.auxiliary_loss = lambda pairs: 0.0
    loss = module.training_step(data, 0)["loss"]
    expected, online, target = separate_passes(reference, data.views, permutation)
    assert (seen["online"] - online).abs().max() == 0
    assert (seen["target"] - target).abs().max() == 0
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, buffer in reference.named_buffers():
        assert torch.allclose(buffer, module.get_buffer(name), atol=1e-6), name


def test_joint_statistics_see_both_views():
    module = silence(tiny_bolt())
    module.training_step(batch(size=6), 0)
    joint = module.online.projector[1]
    assert joint.num_batches_tracked == 1


def test_pairs_cross_views_and_carry_their_difficulties():
    module = tiny_bolt(mix=0.5)
    online, target = torch.randn(6, 16), torch.randn(6, 16)
    permutation = torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0], [2, 1, 0, 3], [1, 2, 0, 3], [0, 1, 2, 3]])
    first, second = module._pairs(online, target, permutation)
    assert torch.equal(first.online, online[:3])
    assert torch.equal(first.target, target[3:])
    assert torch.equal(second.online, online[3:])
    assert torch.equal(second.target, target[:3])
    assert first.online_difficulty.tolist() == second.target_difficulty.tolist() == [0.25, 0.0, 0.5]
    assert first.target_difficulty.tolist() == second.online_difficulty.tolist() == [0.25, 0.375, 0.0]


def test_gradients_reach_what_they_should():
    module = silence(with_ranker(tiny_bolt()))
    module.training_step(batch(size=16), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.target.parameters())
    assert module.online.encoder.pos_embed.grad is None
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    assert all(parameter.grad is not None for _, parameter in trained)


def test_ranking_alone_trains_its_head_and_the_online_encoder():
    module = silence(with_ranker(tiny_bolt()))
    module.consistency = lambda prediction, projection: prediction.sum() * 0
    module.training_step(batch(size=16), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.target.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.auxiliary.parameters() if parameter.ndim > 1)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "cls_token"):
        assert module.online.encoder.get_parameter(name).grad.abs().sum() > 0, name
    assert module.online.projector[0].weight.grad.abs().sum() == 0


def test_target_moves_after_an_optimizer_step_and_not_in_between():
    module = tiny_bolt()
    seen = []

    class Watch(EMATarget):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append(pl_module.target.projector[0].weight.clone())

    start = module.target.projector[0].weight.clone()
    trainer = quiet_trainer(accumulate_grad_batches=2, callbacks=[Watch("online", "target", momentum=0.5)])
    trainer.fit(module, loader(batches(4)))
    moved = [not torch.equal(a, b) for a, b in zip([start, *seen[:-1]], seen, strict=True)]
    assert moved == [False, True, False, True]


def test_byol_has_no_perturbation_and_no_difficulty():
    module = silence(tiny_bolt(perturb=False))
    assert not any("perturbation" in name for name, _ in module.named_parameters())
    assert module.perturbation_strength == (0.0, 0.0)
    assert module.sample_permutations(batch().images) is None
    pairs = module._pairs(torch.randn(4, 16), torch.randn(4, 16), None)
    assert pairs[0].online_difficulty.tolist() == [0, 0]
    assert module.pictures(batch()) == {}


def test_simsiam_is_byol_with_a_target_that_copies():
    module = tiny_bolt(perturb=False)
    follow = EMATarget("online", "target", momentum=0.0, schedule="constant")
    quiet_trainer(callbacks=[follow]).fit(module, loader(batches(3, views=2)))
    for (name, online), target in zip(module.online.named_parameters(), module.target.parameters(), strict=True):
        assert torch.equal(online, target), name


def test_mocov3_contrasts_with_the_other_view():
    module = tiny_bolt(perturb=False, loss="infonce", temperature=0.3)
    module.all_gather = lambda x: x
    prediction, projection = torch.randn(8, 6), torch.randn(8, 6)
    expected = info_nce(prediction[:4], projection[4:], 0.3) + info_nce(prediction[4:], projection[:4], 0.3)
    assert module.consistency(prediction, projection).item() == pytest.approx(expected.item(), abs=1e-6)


def test_training_lowers_the_loss_and_logs_its_names():
    logged = {}
    for epochs in (1, 12):
        callbacks = [DifficultyRanking(), EMATarget("online", "target", momentum=0.9)]
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(tiny_bolt(lr=3e-3), loader(batches(4, size=16)))
        logged[epochs] = trainer.callback_metrics
    names = {"loss", "loss_consistency", "z_std", "rank_loss", "rank_acc", "difficulty_gap", "tau"}
    assert {f"train/{name}" for name in names} <= set(logged[12])
    assert logged[12]["train/loss_consistency"] < logged[1]["train/loss_consistency"] / 2


def test_logged_spread_is_that_of_the_online_projections():
    module = silence(tiny_bolt())
    kept = {}
    module.online.projector.register_forward_hook(lambda _, __, output: kept.update(z=output))
    assert module.training_step(batch(), 0)["z_std"].item() == pytest.approx(normalised_std(kept["z"]).item())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions(precision):
    module = tiny_bolt(loss="cosine")
    trainer = quiet_trainer(precision=precision, callbacks=[DifficultyRanking()], gradient_clip_val=3.0)
    trainer.fit(module, loader(batches(2)))
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert module.online.encoder.cls_token.dtype == torch.float32


def test_frozen_patch_embedding_stays():
    module = tiny_bolt(freeze_patch_embed=True)
    before = module.online.encoder.patch_embed.proj.weight.clone()
    quiet_trainer().fit(module, loader(batches(2)))
    assert torch.equal(module.online.encoder.patch_embed.proj.weight, before)


def test_only_the_blocks_are_compiled_and_no_name_changes():
    module, plain = tiny_bolt(compile_blocks=True), tiny_bolt()
    module.setup("validate")
    assert module.online.encoder.blocks._compiled_call_impl is None
    module.setup("fit")
    assert module.online.encoder.blocks._compiled_call_impl is not None
    assert module.target.encoder.blocks._compiled_call_impl is not None
    assert module.deployable_network().blocks._compiled_call_impl is None
    assert list(module.state_dict()) == list(plain.state_dict())


def test_features_and_deployable_network_are_the_plain_encoder():
    module = tiny_bolt().eval()
    images = batch().images
    features = module.extract_features(images)
    assert torch.equal(features, module.online.encoder(images))
    assert torch.equal(module.deployable_network()(images), features)
    assert torch.equal(module(images), features)
    assert module.deployable_network().cls_token is not module.online.encoder.cls_token


def test_evaluation_steps_hand_out_features():
    module, data = tiny_bolt().eval(), batch()
    for step in (module.validation_step, module.test_step):
        output = step(data, 0)
        assert torch.equal(output["features"], module.extract_features(data.images))
        assert torch.equal(output["labels"], data.labels)
        assert torch.equal(output["index"], data.index)


class Probe(nn.Module):
    def __init__(self, fitted):
        super().__init__()
        self.register_buffer("fitted", torch.tensor(fitted))

    def predict_proba(self, features):
        return features[:, :3].softmax(1)


def test_prediction_by_the_fitted_probe_or_features():
    data = batch()
    module = tiny_bolt().eval()
    module.auxiliary["linear_probe"] = Probe(True)
    output = module.predict_step(data, 0)
    assert torch.equal(output["probabilities"], module.extract_features(data.images)[:, :3].softmax(1))
    assert torch.equal(output["index"], data.index)
    assert set(tiny_bolt(predict_output="features").predict_step(data, 0)) == {"index", "features"}


@pytest.mark.parametrize("entries", [{}, {"linear_probe": Probe(False)}])
def test_prediction_without_a_fitted_probe(entries):
    module = tiny_bolt()
    module.auxiliary.update(entries)
    with pytest.raises(ValueError, match=r"no fitted linear probe.*FeatureProbes\(linear=True\).*predict_output: feat"):
        module.predict_step(batch(), 0)


def test_pictures_show_both_layouts_and_leave_the_random_state_alone():
    module = tiny_bolt(mix=1.0)
    state = torch.get_rng_state()
    shown = module.pictures(batch(size=12))
    assert torch.equal(state, torch.get_rng_state())
    assert {key: len(pictures) for key, pictures in shown.items()} == {"perturbed/online": 8, "perturbed/target": 8}
    image, caption = shown["perturbed/online"][0]
    assert image.shape == (3, 8, 8)
    original = batch(size=12).images[0, 0]
    original = (original - original.min()) / (original.max() - original.min())
    assert np.allclose(np.sort(image[0].flatten()), np.sort(original.flatten()), atol=1e-6)
    patches = image[0].unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    own = original.unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    displaced = (patches - own).abs().amax(1) > 1e-6
    assert caption == f"difficulty {displaced.float().mean().item():.2f}"


def test_checkpoint_holds_plain_things(tmp_path):
    trainer = quiet_trainer(callbacks=[DifficultyRanking(), EMATarget("online", "target")])
    module = tiny_bolt()
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["encoder_options"] == TINY
    plain = (str, int, float, bool, type(None), dict)
    assert all(isinstance(value, plain) for value in content["hyper_parameters"].values())
    read = BOLT.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(read.target.projector[3].weight, module.target.projector[3].weight)


def test_a_batch_of_one():
    with pytest.raises(ValueError, match=r"batch holds 1 image.*BatchNorm.*data.batch_size above 1.*drop_last"):
        tiny_bolt().training_step(batch(size=1), 0)


def test_too_many_views():
    with pytest.raises(ValueError, match="views: 3 views per image; expected 1 or 2"):
        tiny_bolt().training_step(batch(views=3), 0)


@pytest.mark.parametrize("settings", [{"perturb": False}, {"r_max": 0.0}])
def test_one_view_without_perturbation_is_pointed_out(settings):
    with pytest.warns(UserWarning, match="there is nothing to learn. Set data.views: 2"):
        quiet_trainer().fit(tiny_bolt(**settings), loader(batches(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_min": 0.9, "r_max": 0.1}, "r_min: 0.9 is above r_max: 0.1"),
        ({"mix": 0.0}, r"mix: 0.0 is outside \(0, 1\]"),
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"lr": -1.0}, "lr: -1.0 is not positive"),
        ({"projector_dim": 0}, "projector_dim: 0 is below 1"),
        ({"image_size": 9}, "image_size: 9 is not divisible by the patch size 2; nearest valid sizes: 8 and 10"),
        ({"encoder": "resnet18", "encoder_options": {}}, "resnet18 .* has no sequence of patch tokens"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_bolt(**settings)


def test_ranking_without_a_range_of_strengths_is_an_error():
    with pytest.raises(ValueError, match=r"(?i)tie"):
        with_ranker(tiny_bolt(r_min=0.5, r_max=0.5))
