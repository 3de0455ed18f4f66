"""Chat templates that mean harm, by what they try, and ordinary ones; the fuzzer starts from them too."""

from __future__ import annotations

_LONG_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

# Ways out of Jinja's sandbox, published ones among them: into Python's objects, the worker's globals, or files.
ESCAPES = {
    "reads classes": "{{ ''.__class__ }}",
    "reads classes by subscript": "{{ ''['__class__'] }}",
    "reads classes by filter": "{{ '' | attr('__class__') }}",
    "reads classes by a name put together": "{{ '' | attr('__cl' ~ 'ass__') }}",
    "reads classes by an escaped name": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "reads classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "reads classes by format_map (CVE-2019-10906)": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "reads classes by a format method kept (CVE-2016-10745)": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "reads classes by a format method passed on (CVE-2024-56326)": (
        "{{ ['{0.__class__.__mro__}'] | map('attr', 'format') | map('join') | list }}"
        "{% macro f(g) %}{{ g('') }}{% endmacro %}{{ f('{0.__class__}'.format) }}"
    ),
    "reads classes by attr of format (CVE-2025-27516)": "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "reads classes by map": "{{ ['x'] | map(attribute='__class__') | list }}",
    "reads classes by map of attr": "{{ ['x'] | map('attr', '__class__') | list }}",
    "reads classes by groupby": "{{ ['x'] | groupby('__class__') }}",
    "reads classes by sort": "{{ ['x', 'y'] | sort(attribute='__class__') }}",
    "reads classes by sum": "{{ ['x'] | sum(attribute='__class__', start='') }}",
    "reads classes by selectattr": "{{ ['x'] | selectattr('__class__') | list }}",
    "reads classes by unique": "{{ ['x'] | unique(attribute='__class__.__mro__') | list }}",
    "reads subclasses": "{{ [].__class__.__base__.__subclasses__() }}",
    "reads mro of a class": "{{ namespace.mro() }}",
    "reads a function's globals": "{{ raise_exception.__globals__ }}",
    "reads a function's code": "{{ raise_exception.__code__ }}",
    "reads a filter's globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "reads a class's globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "reads another class's globals": "{{ joiner.__init__.__globals__.__builtins__ }}",
    "reads a namespace's globals": "{{ namespace.__init__.__globals__ }}",
    "reads a macro's function": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "reads a macro's environment": "{% macro f() %}{% endmacro %}{{ f._environment }}{{ f.__init__.__globals__ }}",
    "reads a method's function": "{{ strftime_now.__self__ }}",
    "reads a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "reads its own code": "{{ self.__init__.__globals__ }}",
    "reads its own template": "{{ self._TemplateReference__context.environment.loader }}",
    "reads a loop's environment": "{% for m in messages %}{{ loop._undefined.__init__.__globals__ }}{% endfor %}",
    "reads an undefined value's globals": "{{ nothing.__init__.__globals__ }}{{ nothing._undefined_exception }}",
    "imports by builtins": "{{ dict.__base__.__subclasses__()[0].__init__.__builtins__['__import__']('os') }}",
    "changes its messages": "{{ messages.append(1) }}",
    "changes a message": "{{ messages[0].update({'role': 'system'}) }}",
    "changes by do": "{% do messages.clear() %}",
    "changes by attr": "{{ (messages | attr('pop'))() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "includes what may be missing": "{% include ['/etc/passwd', '/etc/group'] %}",
    "imports a file": "{% import '/etc/passwd' as x %}",
    "imports names from a file": "{% from '/etc/passwd' import x %}",
    "extends a file": "{% extends '/etc/passwd' %}",
    "calls what is not there": "{{ open('/etc/passwd') }}",
}

# What takes time, memory or output without bound.
EXHAUSTING = {
    "loops for ever": _LONG_LOOP,
    "loops for ever in a condition": "{% if (range(99999) | map('string') | join | list | length) %}"
    + _LONG_LOOP
    + "{% endif %}",
    "loops for ever by recursion in a loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "computes for ever in C": "{{ 7 ** (7 ** 77777777) }}",
    "multiplies without end": (
        "{% set ns = namespace(x=7) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    ),
    "takes memory at once": "{{ ('x' * 10 ** 10) | length }}",
    "takes memory bit by bit": (
        "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "takes memory by format": "{{ '{:>9999999999}'.format('x') | length }}",
    "takes memory by percent": "{{ '%9999999999d' % 1 }}",
    "takes memory by filter format": "{{ '%9999999999s' | format('x') }}",
    "takes memory by center": "{{ 'x'.center(9999999999) | length }}",
    "takes memory by indent": "{{ ('x\\n' * 99999) | indent(9999999) | length }}",
    "takes memory by replace": "{{ ('x' * 99999).replace('x', 'y' * 99999).replace('y', 'z' * 9999) | length }}",
    "takes memory by slices": "{{ messages | slice(999999999) | list | length }}",
    "takes memory by batches": "{{ messages | batch(999999999, 'x') | list | length }}",
    "builds lists": "{{ [[0] * 10 ** 9] | length }}",
    "writes without end": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "writes words without end": "{{ lipsum(n=99999, html=false) }}",
    "writes one large piece": "{{ 'x' * 10 ** 6 }}",
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recurses in two": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "asks for too long a range": "{% for x in range(10 ** 9) %}{% endfor %}",
    "nests deeply": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
    "nests blocks deeply": "{% if x %}" * 3000 + "{% endif %}" * 3000,
}

# What is simply wrong.
BROKEN = {
    "is no template": "{% for %}",
    "divides by zero": "{{ 1 / 0 }}",
    "makes no text": "{{ '\\ud800' }}",
    "refuses": "{{ raise_exception('only one message \\ud800') }}",
    "uses a filter that is not there": "{{ messages | no_such_filter }}",
}

ORDINARY = (
    "{{ strftime_now('%Y-%m-%d') }} {{ messages | tojson }} {{ {'b': 1, 'a': '<&>'} | tojson(indent=1) }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% generation %}x{% endgeneration %}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('<b>') }}{{ missing is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = loop.index %}{% endfor %}{{ ns.n }}",
    "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m['content'].split(' ')[0] | trim }}{% endfor %}",
    "{% set größe = 3 %}{{ größe }}",
)
