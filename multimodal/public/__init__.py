"""Models that others made, from folders of diffusers' format, as the same stages that ours are.

names      one folder or several, as they are written      loading    they as a model
folders    what may stand in a folder, its parts one by one
sampling   scheduler_config.json as our samplers           texts      the text encoders, as first stages
rows       what all stages that draw share                 priors     from a text to an image embedding
stable     Stable Diffusion                                kandinsky, unclip, deepfloyd     the other families
"""
