"""Which requests a routed engine accepts: asked where a prompt is rendered, and again before it is scheduled.

What is installed here follows from the engine's configuration, which every process gets: the model
class brings the prompt's processor (front ends), the scheduler the engine core's check.
"""
