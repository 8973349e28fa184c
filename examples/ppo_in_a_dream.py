"""Train Stable-Baselines3's PPO inside a run's dream: to PPO it is an environment like any other.

python examples/ppo_in_a_dream.py runs/carracing-quick --steps 50000
"""

from __future__ import annotations

import argparse

import gymnasium
from stable_baselines3 import PPO


def main(argv: list[str] | None = None) -> PPO:
    """Train, and return the learner."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, or its name in runs/")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--horizon", type=int, default=200, help="steps after which a dream is cut off")
    options = parser.parse_args(argv)
    env = gymnasium.make("oneira.agents:oneira/Dream-v0", run=options.run, max_steps=options.horizon)
    learner = PPO("MlpPolicy", env, n_steps=min(1024, options.steps), batch_size=64, device="cpu", verbose=0)
    learner.learn(options.steps)
    seen, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        action, _ = learner.predict(seen, deterministic=True)
        seen, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        over = terminated or truncated
    print(f"after {options.steps} dreamed steps: {total:.1f} in one dream")
    return learner


if __name__ == "__main__":
    main()
