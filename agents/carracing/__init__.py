"""CarRacing twice: Gymnasium's `CarRacing-v3`, which scores, and a compiled twin of it, which trains.

`track` reads Gymnasium's tracks off, `physics` moves the car, `raster` draws the 64x64 frame, `simulator` steps many cars at once.
"""
