//! Templates by name, for checkpoints that have none of their own.

/// Names of the built-in templates.
pub const NAMES: [&str; 5] = ["guanaco", "chatml", "zephyr", "llama-2", "alpaca"];

/// A template and what is known of the models trained with it.
pub(super) struct Builtin {
    pub source: &'static str,
    /// Strings that end the assistant's turn.
    pub stops: &'static [&'static str],
    /// Answers begin with a space that belongs to the template.
    pub trims_reply: bool,
}

/// TinyLlama's Chat-v0.1 and the openassistant-guanaco data.
const GUANACO: &str = "\
{% for message in messages %}
{% if message.role == 'system' %}{{ message.content | trim + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Human: ' + message.content | trim }}
{%- elif message.role == 'assistant' %}{{ '### Assistant: ' + message.content | trim }}
{%- else %}{{ raise_exception('the roles are system, user and assistant, not ' + message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}";

/// TinyLlama's Chat-v0.2 to v0.5, Qwen, SmolLM2.
const CHATML: &str = "\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// TinyLlama's Chat-v0.6 and v1.0.
const ZEPHYR: &str = "\
{% for message in messages %}
{{ '<|' + message.role + '|>\\n' + message.content + (eos_token or '</s>') + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

const LLAMA_2: &str = "\
{% set bos = bos_token or '<s>' %}
{% set eos = eos_token or '</s>' %}
{% set talk = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set talk.system = '<<SYS>>\\n' + message.content | trim + '\\n<</SYS>>\\n\\n' %}
{% elif message.role == 'user' %}
{{ bos + '[INST] ' + talk.system + message.content | trim + ' [/INST]' }}
{%- set talk.system = '' %}
{% elif message.role == 'assistant' %}
{{ ' ' + message.content | trim + ' ' + eos }}
{%- else %}
{{ raise_exception('the roles are system, user and assistant, not ' + message.role) }}
{% endif %}
{% endfor %}";

const ALPACA: &str = "\
{% if not messages or messages[0].role != 'system' %}
{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{% for message in messages %}
{% if message.role == 'system' %}{{ message.content | trim + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content | trim + '\\n\\n' }}
{%- else %}{{ raise_exception('the roles are system, user and assistant, not ' + message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}";

/// The template of a name.
pub(super) fn find(name: &str) -> Option<Builtin> {
    let (source, stops, trims_reply): (_, &[&str], _) = match name {
        "guanaco" => (GUANACO, &["### Human:", "### Assistant:"], true),
        "chatml" => (CHATML, &["<|im_end|>", "<|im_start|>"], false),
        "zephyr" => (ZEPHYR, &["<|user|>", "<|system|>", "<|assistant|>"], false),
        "llama-2" => (LLAMA_2, &["[INST]", "[/INST]"], true),
        "alpaca" => (ALPACA, &["### Instruction:", "### Response:"], true),
        _ => return None,
    };
    Some(Builtin { source, stops, trims_reply })
}

/// The built-in template with this text.
pub(super) fn of_source(text: &str) -> Option<Builtin> {
    NAMES
        .iter()
        .filter_map(|name| find(name))
        .find(|builtin| builtin.source == text.trim_end_matches('\n'))
}

/// What may end a turn in other people's templates.
const TURN_ENDS: [&str; 12] = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|user|>",
    "[INST]",
    "### Human:",
    "### Instruction:",
    "### User:",
];

/// Those that a template's text names.
pub(super) fn stops_in(text: &str) -> Vec<String> {
    TURN_ENDS.iter().filter(|end| text.contains(**end)).map(|end| end.to_string()).collect()
}
