"""The local page of `afa serve`: what a model sees in a photograph, and what refinements make of a mask.

Functions from arrays to arrays (photographs, masks, seen, refined, legend) know nothing of the page; the page
(model_page, refine_page, widgets, serving) is Gradio's and is given a model. No checkpoint is read here.
"""
