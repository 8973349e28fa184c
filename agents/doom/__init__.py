"""DoomTakeCover through ViZDoom: monsters across the room throw fireballs, the agent steps left or right to stay alive.

`processes` starts games and sees to it that none outlives its owner, `simulator` steps many games at once, `reference` is ViZDoom's own
Gymnasium environment, which scores.
"""
