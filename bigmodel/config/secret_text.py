"""Secrets in names and texts: what is masked before something is printed or saved with a run.

In: names and values of variables, settings, command lines, changes of the source. Out: the same with secrets masked.
A name is secret by its parts: PASSWORD or KEY anywhere, JWT or PASS only as a whole word, so that AUTHOR, BYPASS and
`passes` are none. A value is secret by its shape: a password in a URL, the known beginning of a service's keys, a JSON
Web Token, a private key in PEM form. Imports nothing of the project.
"""

import re
from typing import Any

REDACTED = "(redacted)"
ANYWHERE = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!I[SZ])|(?<!MON)(?<!TUR)(?<!_P)(?<!^P)KEY(?!WORD|BOARD|FRAME|_TAG)",
    re.IGNORECASE,
)  # NCCL_IB_PKEY and TORCH_COMPILE_CACHE_KEY_TAG are ordinary
WORD = re.compile(
    r"(?:DB|PG|SSH|FTP|SMTP|HTTP|USER|ROOT|ADMIN|MYSQL|REDIS|SUDO|GIT|MY)?PASS|PWD|CREDS?|O?AUTH|AUTHORI[SZ]ATION|JWTS?"
    r"|BEARER|COOKIES?|PRIVATE|SAS|DSN"
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of DB_PASS, db-pass, dbPass
ORDINARY = ("", "0", "1", "true", "false", "yes", "no", "on", "off", "none", "null")  # values that are no secret

URL_PASSWORD = re.compile(r"(://[^/@?:\s]*:)[^/?\s]*@")
URL_QUERY = re.compile(r"([?&]([^=&\s]*)=)([^&\s'\":;,]+)")
SIGNATURES = re.compile(r"(?:^|[-_])sig(?:nature)?$", re.IGNORECASE)  # of signed URLs
HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[^\s\"']+", re.IGNORECASE)
PRIVATE_KEY = re.compile(  # whole, or cut off before its end
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[A-Za-z0-9+/=\s\\:,.-]{0,20000}?-----END (?P=kind)-----|(?:(?:\\n|\s|\+)*[A-Za-z0-9+/=]{32,})+)"
)
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|nvapi-[\w-]{20,}|(?:AIza|ya29\.)[\w-]{20,}"  # Hugging Face, OpenAI ... Google
    r"|xox[a-z]-[\w-]{10,}|[rs]k_(?:live|test)_\w{10,}|pypi-[\w-]{20,}|npm_[A-Za-z0-9]{20,}"  # Slack, Stripe, PyPI, npm
    r"|hvs\.[\w-]{20,}|dckr_pat_[\w-]{20,}|ATATT3[\w=-]{20,}|gsk_[A-Za-z0-9]{20,}"  # Vault, Docker, Atlassian, Groq
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|AccountKey=[A-Za-z0-9+/]{40,}=*"  # SendGrid, Azure
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # JSON Web Tokens
    r")"
)
ASSIGNED = re.compile(  # also os.environ["NAME"] = "value"
    r"""(?P<name>(?<![\w.-])\w[\w.-]*)(?P<sign>["']?\]?\s*[:=]\s*)(?P<quote>["'])(?P<value>[^\s"']+)"""
)
PASSED = re.compile(r"""(?P<name>\b[A-Z][A-Z0-9_]*)(?P<sign>["']\s*,\s*)(?P<quote>["'])(?P<value>[^\s"']+)""")
EXPORTED = re.compile(r"""(?P<name>\b[A-Z][A-Z0-9_]*)(?P<sign>=)(?P<quote>)(?P<value>[^\s"']+)""")
OPTION = re.compile(r"""(?P<name>(?<!\S)--[a-z][\w.-]*)(?P<sign>=|\s+)(?P<quote>["']?)(?P<value>[^\s"'$-][^\s"']*)""")
MIN_LETTERS = 12  # of a value in program text: shorter ones are code
MIN_PASSWORD_LETTERS = 6
PASSWORDS = re.compile(r"(?:PASS(?:WORD|WD|PHRASE)?|SECRET)$", re.IGNORECASE)


def is_secret(name: str, value: str = "?") -> bool:
    """Whether a value of this name is to be masked.

    >>> is_secret("SLURM_JWT"), is_secret("dbPass"), is_secret("PATH"), is_secret("AUTHOR"), is_secret("passes")
    (True, True, False, False, False)
    """
    if value.lower() in ORDINARY:
        return False
    words = [word.upper() for word in WORDS.findall(name)]
    return bool(ANYWHERE.search(name)) or (words != ["PWD"] and any(WORD.fullmatch(word) for word in words))


def without_secrets(text: str) -> str:
    """The text with passwords and keys in URLs and all that has the shape of a secret replaced by ***."""
    text = PRIVATE_KEY.sub("***", URL_PASSWORD.sub(r"\1***@", text))
    return SHAPES.sub("***", HEADER.sub(r"\1***", URL_QUERY.sub(_masked_query, text)))


def _masked_query(found: re.Match[str]) -> str:
    return f"{found[1]}***" if is_secret(found[2]) or SIGNATURES.search(found[2]) else found[0]


def without_secret_texts(text: str) -> str:
    """Program text or a command line, also without long values that names make secret: API_KEY=..., "api_key": "...",
    --api-key ..."""
    text = without_secrets(text)
    for pattern in (ASSIGNED, PASSED, EXPORTED, OPTION):
        text = pattern.sub(_masked_value, text)
    return text


def _masked_value(found: re.Match[str]) -> str:
    least = MIN_PASSWORD_LETTERS if PASSWORDS.search(found["name"]) else MIN_LETTERS
    if len(found["value"]) < least or not is_secret(found["name"], found["value"]):
        return found[0]
    return f"{found['name']}{found['sign']}{found['quote']}{REDACTED}"


def without_secrets_inside(value: Any, name: str = "") -> Any:
    """Plain values, nested, with secrets masked, by the names of tables' keys and by shape."""
    if isinstance(value, dict):
        return {key: without_secrets_inside(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets_inside(one, name) for one in value]
    if not isinstance(value, str):
        return value
    return REDACTED if name and is_secret(name, value) else without_secrets(value)
