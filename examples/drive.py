"""Let a trained agent drive Gymnasium's CarRacing, as any other program would.

python examples/drive.py runs/carracing-quick --seed 7
"""

from __future__ import annotations

import argparse

import gymnasium

from oneira.agents import load_agent


def main(argv: list[str] | None = None) -> float:
    """Drive one episode. Returns its return."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, or its name in runs/")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(argv)
    agent = load_agent(options.run)
    env = gymnasium.make("CarRacing-v3")
    frame, _ = env.reset(seed=options.seed)
    agent.reset(num_envs=1)
    total = 0.0
    for _ in range(options.steps):
        frame, reward, terminated, truncated, _ = env.step(agent.act(frame[None])[0])
        total += float(reward)
        if terminated or truncated:
            break
    env.close()
    print(f"track {options.seed}: {total:.1f}")
    return total


if __name__ == "__main__":
    main()
