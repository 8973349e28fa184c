"""Discrete worlds through all parts: how M reads their actions, exploration, dreams that end, and a whole tiny run of DoomTakeCover."""

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from oneira.agents.controller import Controller, ControllerConfig, num_parameters
from oneira.agents.doom_presets import TEMPERATURES, doom_hour, doom_quick, doom_tau_sweep
from oneira.agents.dream import DreamSource, make_dream
from oneira.agents.dreaming import DreamModel
from oneira.agents.exploration import NoisyChoices, RandomChoices
from oneira.agents.fitness import dream_unit
from oneira.agents.memory import MDNRNN, MemoryConfig, read_actions
from oneira.agents.populations import PAPER, alarm_region, exploited
from oneira.agents.settings import PopulationConfig
from oneira.agents.worldmodel import Senses, pack, unpack
from oneira.generative.training import TrainSettings
from oneira.generative.vae import VAE, VAEConfig
from oneira.platform.errors import ConfigError, UsageError

MEMORY = MemoryConfig(
    z=8, action=3, discrete=True, hidden=16, reward_input=False, reward_weight=0.0, done_positive_weight=10.0
)
CONTROLLER = ControllerConfig(features="zch", z=8, memory=16, action_space="threshold", bias=False)


def starts(count=4, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"z": (count, 8), "h": (count, 16), "c": (count, 16), "reward_prev": (count,)}
    return {name: (0.5 * draw(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tree():
    torch.manual_seed(0)
    packed = pack("doom", VAE(VAEConfig(z=8)), [MDNRNN(MEMORY)], CONTROLLER)
    return {**packed, "starts": starts()}


def test_m_reads_a_discrete_action_as_one_hot_whichever_way_it_comes():
    expected = torch.eye(3)[torch.tensor([[2, 0], [1, 1]])]
    whole = np.array([[2, 0], [1, 1]])
    assert torch.equal(read_actions(whole, MEMORY), expected)
    assert torch.equal(read_actions(whole[..., None].astype(np.float32), MEMORY), expected)
    torch.manual_seed(0)
    memory, z, reward = MDNRNN(MEMORY), torch.randn(2, 2, 8), torch.zeros(2, 2)
    kept = memory.observe(z, torch.from_numpy(whole[..., None]).float(), reward)
    assert torch.equal(kept[0], memory.observe(z, torch.from_numpy(whole), reward)[0])


def test_a_weight_on_termination_leaves_the_dreams_odds_alone():
    """A chance of 1 in 20, learned with a weight of 10, must be dreamed as 1 in 20."""
    torch.manual_seed(0)
    memory = MDNRNN(replace(MEMORY, hidden=4))
    with torch.no_grad():
        memory.outcome.weight.zero_()
        memory.outcome.bias[1] = np.log(10 * 1 / 19)  # what the weighted loss makes of those odds
    zeros = np.zeros((5, 8), np.float32), np.zeros(5, np.int64), np.zeros(5, np.float32)
    state = np.zeros((5, 4), np.float32)
    from oneira.agents.dreaming import Noise

    noise = Noise.draw(np.arange(5, dtype=np.uint64), np.zeros(5, np.int64), 8)
    done = DreamModel([memory], memory.config).step(*zeros, state, state, 1.0, noise)[2]
    np.testing.assert_allclose(done, 0.05, atol=1e-4)
    prediction, _ = memory(torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
    assert torch.sigmoid(prediction.done_logit).item() == pytest.approx(0.05, abs=1e-4)


def test_the_weighted_loss_by_hand():
    memory = MDNRNN(MEMORY)
    with torch.no_grad():
        memory.outcome.weight.zero_()
        memory.outcome.bias.zero_()
    batch = {
        "mu": torch.zeros(1, 3, 8), "logvar": torch.zeros(1, 3, 8), "action": torch.zeros(1, 2, 1),
        "reward": torch.ones(1, 2), "done": torch.tensor([[0.0, 1.0]]), "valid": torch.ones(1, 2),
    }  # fmt: skip
    _, terms = memory.loss(batch)
    assert terms["done_bce"].item() == pytest.approx((1 + 10) / 2 * np.log(2), rel=1e-5)


def test_a_controller_sees_z_c_h_in_dreams_and_beside_the_real_world(tree):
    seen = []

    def policy(features):
        seen.append(np.array(features))
        return torch.full(features.shape[:2], 1)

    model, begin = DreamModel(list(unpack(tree).members), MEMORY), starts()
    model.rollout(begin, policy, 2, candidates=3, termination="never", with_cell=True)
    first = np.concatenate([begin["z"], begin["c"], begin["h"]], 1)
    np.testing.assert_array_equal(seen[0], np.broadcast_to(first, (3, *first.shape)))
    assert seen[1].shape == (3, 4, 40) and (seen[1] != seen[0]).all(2).any()

    senses, frames = (
        Senses(unpack(tree), 2),
        np.random.default_rng(0).integers(0, 255, (3, 2, 64, 64, 3), dtype=np.uint8),
    )
    zs = []
    for t in range(3):
        features = senses.see(frames[t])
        zs.append(features[:, :8].copy())
        senses.remember(np.array([t, 2 - t]))
    actions = np.array([[0, 2], [1, 1]]).T
    z = torch.from_numpy(np.stack(zs, 1))[:, :2]
    h, c = unpack(tree).members[0].observe(z, torch.from_numpy(actions.copy()), torch.zeros(2, 2))
    np.testing.assert_allclose(features[:, 8:24], c[:, 2].numpy(), atol=0.02)  # bf16 products
    np.testing.assert_allclose(features[:, 24:], h[:, 2].numpy(), atol=0.02)


def test_a_dream_of_survival_pays_one_a_step_and_its_actions_are_discrete(tree):
    source = DreamSource(
        members=list(unpack(tree).members), config=MEMORY, starts=starts(), decode=lambda z: np.zeros((len(z), 64, 64, 3), np.uint8),
        action_low=np.zeros(3), action_high=np.ones(3), max_steps=30, survival=True,
    )  # fmt: skip
    dream = make_dream(source, num_envs=5)
    assert dream.single_action_space == gymnasium.spaces.Discrete(3)
    dream.reset(seed=0)
    assert dream.features("zch").shape == (5, 40)
    _, rewards, terminated, truncated, _ = dream.step(dream.action_space.sample())
    assert (rewards == 1).all() and terminated.dtype == truncated.dtype == bool
    params = np.zeros((2, num_parameters(CONTROLLER)), np.float32)
    answer = dream_unit(
        tree, {"params": params, "seed": 1, "rollouts": 6, "horizon": 40, "tau": 1.0, "stuck": 0, "lost_cost": 0.0}
    )
    assert answer["returns"].sum() == answer["env_steps"], "what it pays is how long it lasts"


def test_random_choices_last_and_follow_the_seed():
    first, again = (RandomChoices(200, 4, 3) for _ in range(2))
    acts = np.stack([first.act().copy() for _ in range(400)])
    np.testing.assert_array_equal(acts, np.stack([again.act() for _ in range(400)]))
    assert set(np.unique(acts)) == {0, 1, 2} and acts.dtype == np.int64
    changes = (acts[1:] != acts[:-1]).mean(0)
    assert changes.min() < 0.03 and changes.max() > 0.4, "habits differ"
    before = acts[-1].copy()
    mask = np.arange(200) < 100
    first.reset(mask)
    assert (first._action[~mask] == before[~mask]).all() and (first._action[mask] != before[mask]).any()


def test_noisy_choices_err_as_often_as_they_should():
    """A controller of zeros does nothing; with errors uniform in [0, 0.6] some 0.3 x 2/3 of the steps do something else."""
    config = ControllerConfig(features="z", z=4, action_space="threshold")
    noisy = NoisyChoices(2000, 3, config, np.zeros(num_parameters(config)), error=0.6, parameter_noise=0.0)
    features = np.zeros((2000, 4), np.float32)
    other = np.mean([noisy.act(features) != 0 for _ in range(200)])
    assert other == pytest.approx(0.3 * 2 / 3, abs=0.03)


def test_the_alarm_rings_for_the_papers_cold_dreams_alone():
    rung = {tau: exploited({"dream": {"mean": d}, "real": {"mean": r}}, 2100) for tau, (d, r) in PAPER["doom"].items()}
    assert rung == {0.1: True, 0.5: True, 1.0: False, 1.15: False, 1.3: False}


def test_the_plot_shades_where_the_rule_rings():
    dream, below = alarm_region(2100, 2100)
    for d in (300, 600, 640, 1000, 1288, 2000):
        line = np.interp(d, dream, below)
        for real in (max(line - 5, 0.0), line + 5):
            assert exploited({"dream": {"mean": d}, "real": {"mean": real}}, 2100) == (real < line), (d, real)


def test_the_presets_are_the_papers_sizes():
    for preset in (doom_quick, doom_hour, doom_tau_sweep):
        config = preset()
        assert num_parameters(config.controller) == 1088 and config.memory.hidden == 512 and config.vision.z == 64
        assert all(p.world == "dream" for r in config.rounds for p in r.populations)
    populations = doom_tau_sweep().rounds[-1].populations
    assert tuple(p.tau for p in populations) == TEMPERATURES and doom_tau_sweep().rounds[-1].segments == 1


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_impossible_temperatures_are_refused(tau):
    with pytest.raises(ConfigError, match=r"tau is .*; a temperature must be above 0"):
        PopulationConfig(name="dream", world="dream", tau=tau)


def test_parts_of_another_world_are_refused():
    with pytest.raises(ConfigError, match=r"world 'doom' takes discrete actions of size 3; .*'carracing'"):
        replace(doom_quick(), controller=replace(doom_quick().controller, action_space="carracing"))


# ---- a whole run


def tiny():
    config = doom_tau_sweep().smoke()
    r = config.rounds[0]
    settings = TrainSettings(steps=4, batch_size=8)
    populations = (replace(config.rounds[-1].populations[3], horizon=40),)
    return replace(
        config, vision=VAEConfig(z=8), memory=MEMORY, controller=CONTROLLER, window=8, starts=16, checks=2, check_episodes=1,
        film_steps=8, rounds=(replace(r, vision=settings, memory=settings, populations=populations),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("vizdoom")
    from oneira.platform.executor import SerialExecutor
    from oneira.platform.runs import Run

    run = Run.create(tmp_path_factory.mktemp("doom") / "run", "doom-tau-sweep", tiny())
    with SerialExecutor() as executor:
        run.config.train(run, executor)
    run.config.report(run)
    return run


def test_a_run_scores_each_population_in_both_worlds(run):
    for name, tau in (("tau-1.15", 1.15),):
        found = json.loads((run.path / "evaluations" / "populations" / f"{name}.json").read_text())
        assert found["tau"] == tau and found["dream"]["conditions"] == {"tau": tau}
        assert found["real"]["env_id"] == "VizdoomTakeCover-v1" and found["real"]["env_version"].startswith("vizdoom ")
        assert found["real"]["conditions"] == {"skill": 4, "frame_skip": 1, "max_steps": 2100}
        assert found["real"]["seeds"] == [2**30, 2**30 + 1]
    html = run.report_path.read_text()
    assert "Every population in its dream and in reality" in html and "1092" in html and "tau-1.15" in html


def test_its_agent_acts_on_the_reference_games_frames(run):
    from oneira.agents import load_agent

    agent = load_agent(run)
    agent.reset(2)
    actions = agent.act(np.zeros((2, 240, 320, 3), np.uint8))
    assert actions.shape == (2,) and actions.dtype == np.int64
    agent.reset(1)
    with pytest.raises(UsageError, match=r"trained in 'doom' \(VizdoomTakeCover-v1\)"):
        agent.act(np.zeros((1, 96, 96, 3), np.uint8))


def test_its_dream_is_a_gymnasium_environment(run):
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("oneira.agents:oneira/Dream-v0", run=str(run.path), render_mode="rgb_array")
    assert env.action_space == gymnasium.spaces.Discrete(3)
    check_env(env.unwrapped)
    _, reward, *_ = env.step(env.action_space.sample()) if env.reset(seed=0) else ()
    assert reward == 1 and env.render().shape == (64, 64, 3)


def test_its_rollouts_go_to_minari_and_back(run, tmp_path):
    pytest.importorskip("minari")
    from oneira.agents.minari_io import export_minari, import_minari
    from oneira.agents.stages import store_of

    store = store_of(run)
    folder = export_minari(store, "oneira/doom-v0", root=tmp_path)
    import minari

    dataset = minari.MinariDataset(folder / "data")
    assert dataset.action_space == gymnasium.spaces.Discrete(3)
    assert dataset[0].actions.dtype == np.int64
    back = import_minari("oneira/doom-v0", tmp_path / "back", root=tmp_path)
    np.testing.assert_array_equal(back.actions, store.actions)
    assert back.episodes() == store.episodes() and Controller(run.config.controller).num_parameters == 40
