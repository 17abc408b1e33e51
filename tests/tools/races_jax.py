"""A kernel of the JAX twin under the race detector of Pallas' GPU interpreter."""

import functools

import jax

from pallas_impl.call import interpreter


def run_with_races(launch, arrays, options, **more):
    """Runs `launch(arrays, options)`. Returns (its result or None, whether a race or a missing wait was seen)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    interpret = type(interpreter(True))(out_of_bounds_reads="uninitialized", detect_races=True)
    call = functools.partial(launch, options=options._replace(interpret=interpret), **more)
    try:
        result = jax.block_until_ready(jax.jit(call)(arrays))
        return result, gpu_callbacks.get_races().races_found
    except jax.errors.JaxRuntimeError as error:
        # JAX 0.12 raises where others record; a barrier that completes again before anyone looked is an error to all
        signs = ("race detected", "previous completion was observed", "threads observed phase")
        if not any(sign in str(error).lower() for sign in signs):
            raise
        return None, True
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
