"""Where the parts of a model lie: sheets cut into areas, and the copies between two placements.

One vocabulary for whoever plans a switch and whoever performs it. Pure, no tensors.
"""
