"""The audit: published attacks, run on what a real worker process wrote down, and what they found of each profile.

==================  ===================================================================================
``recorder``        a worker that writes down everything it gets and gives
``view``            what a curious operator reads from that: keyed weights, rows in and out, sizes, times
``reference``       a plain model in the coordinates that a profile keys: the truth, or a public base
``attack``          the one interface of all attacks; ``attacks/`` has one idea a file
``fixtures``        a public base, private models fine-tuned from it, and an unrelated one
``lab``             records a private model under a profile, and puts the truth beside it
``controls``        what must be found, and what must not, before anything is concluded
``runner``          attacks x profiles x token budgets x seeds
``verdict``         figures to words: chance, broken, known leak
``report``          table, figures, page, JSON
==================  ===================================================================================

An attack sees a view and what it is said to need; the truth is only given to its score.
"""
