//! FLOPs of a token, peak rates of cards, and the two MFU figures.
//!
//! Peers' MFU differ by up to 14 % for the same speed because they count differently, so this
//! project always prints two figures, with these conventions:
//!
//! - `mfu`: 6*N_matmul + 12*L*C*T FLOP per token, the count of PaLM (appendix B) and nanochat. It
//!   charges attention as if every query saw all T keys.
//! - `mfu_causal`: 6*N_matmul + 6*L*C*T, the count of llm.c. It charges the half that a causal mask
//!   leaves, which is what a causal kernel computes.
//!
//! 6 = 2 FLOP a multiply-add, times forward (1) plus backward (2). Recomputation counts for nothing
//! in either: MFU is about the model's work, not the hardware's. Weights that are not trained, beside
//! adapters, have no gradient and count 4; nor does the pass of a reference model count.

/// Model FLOPs of one token, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlopsPerToken {
    /// `6*N_matmul + 12*L*C*T`: full attention. The numerator of `mfu`.
    pub full: f64,
    /// `6*N_matmul + 6*L*C*T`: causal attention. The numerator of `mfu_causal`.
    pub causal: f64,
}

/// Model FLOPs of one token of a sequence of `t` tokens, forward and backward.
///
/// - `n_matmul_params`: weights that multiply activations: the blocks' linear layers and the head.
///   The input embedding is a look-up and does not count; the head counts once, also where the two
///   are tied. Norms and biases do not count.
/// - `n_trained`: those of them that get a gradient, adapters among both.
/// - `attention_width`: `n_head * head_size`, the C of the attention term. Grouped queries do not
///   lower it: every query head still meets T keys.
///
/// TinyLlama 1.1B at T = 2048: 7.314 and 6.760 GFLOP.
pub fn flops_per_token(
    n_matmul_params: u64,
    n_trained: u64,
    n_layer: u64,
    attention_width: u64,
    t: u64,
) -> FlopsPerToken {
    let matmul = 4.0 * n_matmul_params as f64 + 2.0 * n_trained as f64;
    let scores = n_layer as f64 * attention_width as f64 * t as f64; // L*C*T
    FlopsPerToken { full: matmul + 12.0 * scores, causal: matmul + 6.0 * scores }
}

/// Model FLOPs utilisation: achieved model FLOP/s over the card's peak, as a fraction (0.581).
pub fn mfu(tokens_per_sec_per_gpu: f64, flops_per_token: f64, peak_flops: f64) -> f64 {
    tokens_per_sec_per_gpu * flops_per_token / peak_flops
}

/// Peak rates in TFLOP/s: dense (no 2:4 sparsity) bf16 tensor cores with fp32 accumulation, at the
/// boost clock of NVIDIA's data sheets. GeForce cards halve their rate when they accumulate in
/// fp32, which training does; the figures here are the halved ones.
///
/// Each row: words that must all appear in the driver's device name, words that must not, TFLOP/s.
/// The first row that fits wins. Cards without bf16 tensor cores (V100, T4, RTX 20) have no row.
const PEAKS: &[(&[&str], &[&str], f64)] = &[
    // Blackwell
    (&["GB200"], &[], 2500.0),
    (&["B200"], &[], 2250.0),
    (&["RTX", "5090"], &["Laptop", "5090 D"], 209.5),
    // Hopper. To count as the SXM module, a bare H100 must say HBM3 or SXM.
    (&["GH200"], &[], 989.4),
    (&["H200", "NVL"], &[], 835.5),
    (&["H200"], &["PCIe"], 989.4),
    (&["H100", "NVL"], &[], 835.5),
    (&["H100", "PCIe"], &[], 756.0),
    (&["H100", "HBM3"], &[], 989.4),
    (&["H100", "SXM"], &[], 989.4),
    (&["H800", "PCIe"], &[], 756.0),
    (&["H800", "HBM3"], &[], 989.4),
    (&["H800", "SXM"], &[], 989.4),
    (&["H20"], &[], 148.0),
    // Ampere, data centre
    (&["A100"], &[], 312.0),
    (&["A800"], &[], 312.0),
    (&["A30"], &[], 165.0),
    (&["A40"], &[], 149.7),
    (&["A10"], &[], 125.0),
    // AWS's own variant with fewer active tensor cores; lit-gpt books it at the A10's 125.
    (&["A10G"], &[], 70.0),
    // Ampere, workstation and GeForce
    (&["RTX", "A6000"], &["Laptop"], 154.8),
    (&["RTX", "3090", "Ti"], &["Laptop"], 80.0),
    (&["RTX", "3090"], &["Laptop"], 71.0),
    (&["RTX", "3080"], &["Laptop", "Ti"], 59.5), // 10 GB; the 12 GB card bears the same name
    // Ada
    (&["L4"], &[], 121.0),
    (&["L40"], &[], 181.0),
    (&["L40S"], &[], 362.0),
    (&["RTX 6000 Ada"], &["Laptop"], 364.2),
    (&["RTX", "4090"], &["Laptop", "4090 D"], 165.2),
    (&["RTX", "4080"], &["Laptop", "SUPER"], 97.5),
];

/// Peak dense bf16 rate of a card in FLOP/s, by its driver's name (`NVIDIA H100 80GB HBM3`).
///
/// `None` for a CPU, an unknown card, a card without bf16 tensor cores, a laptop variant, a MIG
/// slice (a fraction of a card): [`no_peak_note`] is what the log says then, instead of a guess.
/// The bf16 peak is the denominator whatever the precision of the run, as among peers.
pub fn peak_bf16_flops(device_name: &str) -> Option<f64> {
    if has_word(device_name, "MIG") {
        return None;
    }
    PEAKS
        .iter()
        .find(|(all, none, _)| {
            all.iter().all(|w| has_word(device_name, w))
                && !none.iter().any(|w| has_word(device_name, w))
        })
        .map(|(_, _, tflops)| tflops * 1e12)
}

/// What the log says once where there is no peak: `mfu n/a (no peak known for X)`.
pub fn no_peak_note(device_name: &str) -> String {
    format!("mfu n/a (no peak known for {device_name})")
}

/// Whether `words` stands in `text` as whole words: `A10` is not in `A100`, `L4` is not in `L40S`.
fn has_word(text: &str, words: &str) -> bool {
    let text = text.to_ascii_lowercase();
    let words = words.to_ascii_lowercase();
    text.match_indices(&words).any(|(at, found)| {
        let before = text[..at].chars().next_back();
        let after = text[at + found.len()..].chars().next();
        let edge = |c: Option<char>| !c.is_some_and(|c| c.is_ascii_alphanumeric());
        // `H100 SXM5` and `A100-SXM4`: the module's generation follows its name.
        edge(before) && (edge(after) || found == "sxm")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TinyLlama 1.1B: L 22, C 2048, F 5632, G 4 of 32 heads, V 32000.
    fn tinyllama_matmul_params() -> u64 {
        let (c, f, v, kv) = (2048, 5632, 32000, 4 * 64);
        22 * (c * (c + 2 * kv) + c * c + 3 * c * f) + v * c
    }

    #[test]
    fn tinyllama_at_2048_costs_7_314_and_6_760_gflop_a_token() {
        // 1,100,048,384 parameters less the input embedding and 45 norms.
        assert_eq!(tinyllama_matmul_params(), 1_100_048_384 - 32000 * 2048 - 45 * 2048);
        let flops =
            flops_per_token(tinyllama_matmul_params(), tinyllama_matmul_params(), 22, 2048, 2048);
        assert_eq!((flops.full / 1e6).round(), 7314.0);
        assert_eq!((flops.causal / 1e6).round(), 6760.0);
    }

    #[test]
    fn the_original_run_at_24k_tokens_a_second_on_an_a100_is_56_percent() {
        let flops =
            flops_per_token(tinyllama_matmul_params(), tinyllama_matmul_params(), 22, 2048, 2048);
        let peak = peak_bf16_flops("NVIDIA A100-SXM4-40GB").unwrap();
        assert_eq!((mfu(24_000.0, flops.full, peak) * 1000.0).round(), 563.0);
        assert_eq!((mfu(24_000.0, flops.causal, peak) * 1000.0).round(), 520.0);
    }

    #[test]
    fn cards_are_known_by_the_names_their_drivers_give() {
        let cards = [
            ("NVIDIA H100 80GB HBM3", 989.4),
            ("NVIDIA H100 PCIe", 756.0),
            ("NVIDIA H100 NVL", 835.5),
            ("NVIDIA H200", 989.4),
            ("NVIDIA H200 NVL", 835.5),
            ("NVIDIA GH200 480GB", 989.4),
            ("NVIDIA B200", 2250.0),
            ("NVIDIA GB200", 2500.0),
            ("NVIDIA A100-SXM4-40GB", 312.0),
            ("NVIDIA A100-SXM4-80GB", 312.0),
            ("NVIDIA A100 80GB PCIe", 312.0),
            ("A100-SXM4-40GB", 312.0),
            ("NVIDIA A800-SXM4-80GB", 312.0),
            ("NVIDIA A10", 125.0),
            ("NVIDIA A10G", 70.0),
            ("NVIDIA A30", 165.0),
            ("NVIDIA A40", 149.7),
            ("NVIDIA RTX A6000", 154.8),
            ("NVIDIA RTX 6000 Ada Generation", 364.2),
            ("NVIDIA L4", 121.0),
            ("NVIDIA L40", 181.0),
            ("NVIDIA L40S", 362.0),
            ("NVIDIA GeForce RTX 4090", 165.2),
            ("NVIDIA GeForce RTX 4080", 97.5),
            ("NVIDIA GeForce RTX 3090", 71.0),
            ("NVIDIA GeForce RTX 3090 Ti", 80.0),
            ("NVIDIA GeForce RTX 3080", 59.5),
            ("NVIDIA GeForce RTX 5090", 209.5),
        ];
        for (name, tflops) in cards {
            assert_eq!(peak_bf16_flops(name), Some(tflops * 1e12), "{name}");
        }
    }

    #[test]
    fn an_unknown_card_has_no_peak_instead_of_a_guess() {
        for name in [
            "CPU",
            "",
            "NVIDIA H100",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 4080 SUPER",
            "NVIDIA GeForce RTX 3080 Ti",
            "Tesla V100-SXM2-16GB",
            "Tesla T4",
            "AMD Instinct MI300X",
        ] {
            assert_eq!(peak_bf16_flops(name), None, "{name}");
        }
        assert_eq!(no_peak_note("Tesla T4"), "mfu n/a (no peak known for Tesla T4)");
    }
}
