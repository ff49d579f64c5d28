"""One OpenAI endpoint for every model of the host.

::

    request ──▶ model_field: which name does the body say? ──▶ model_names: which model is that?
                                                                     │
            response ◀── relay: byte for byte ◀── its server ◀── ready, or started for it

The body is kept as it came, but for the model's name; the answer is not looked into as it passes, and its ends are read
when it is through, for what they say of tokens (``tallies``). Whatever goes wrong on these paths is told in the form
that clients of the OpenAI API know (``openai_errors``).

The gateway starts and stops nothing: it says what it wants (``Servers``), and the reconciler does it.
"""
