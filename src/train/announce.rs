//! What a run says of itself at its beginning.

use super::backends::cache_file;
use super::ranks;
use super::run::Run;
use crate::config::{CudaGraph, MatmulBackend, counted, with_commas};
use crate::ffi;
use anyhow::Result;
use tch::Device;

impl Run<'_> {
    /// What will run, before it runs.
    pub(super) fn announce(&self) -> Result<()> {
        let name = match self.device {
            Device::Cuda(i) => ffi::cuda_device(i)?.name,
            _ => format!("CPU, {}", counted(tch::get_num_threads() as u64, "thread")),
        };
        let millions = self.model.config.n_params() as f64 / 1e6;
        eprintln!(
            "model       {} with {millions:.1}M parameters",
            self.config.model_told(&self.model.config)
        );
        if let Some(lora) = self.config.lora() {
            let trained: usize = self.model.adapters().iter().map(|(_, t)| t.numel()).sum();
            eprintln!(
                "adapters    rank {} at {}: {} parameters, {:.2} %",
                lora.r,
                lora.targets.join(", "),
                with_commas(trained as u64),
                trained as f64 / millions / 1e4
            );
        }
        eprintln!("device      {name}, {}", self.config.precision);
        eprintln!("batch       {}", self.plan);
        if let (Some(job), Some(ranks)) = (self.job, &self.ranks) {
            eprintln!("ranks       {}", ranks::told(job, ranks, &self.config.distributed)?);
        }
        let captures = self.device.is_cuda() && self.config.cuda_graph == CudaGraph::Auto;
        if captures && self.job.is_some() {
            eprintln!("graph       none: what travels between ranks is no part of one");
        } else if captures && self.config.finetune.is_some() {
            eprintln!("graph       none: the loss of conversations has another scale in each step");
        }
        if self.model.recomputed_blocks > 0 {
            let (again, all) = (self.model.recomputed_blocks, self.model.h.len());
            eprintln!("recompute   {again} of {all} blocks, in the backward pass");
        }
        if self.config.optimizer.cpu_offload {
            eprintln!("offload     exact weights and moments on the host, streamed once a step");
        }
        if self.config.data.document_mask {
            eprintln!("documents   attention stays within each (`data.document_mask`)");
        }
        for line in &self.data_told {
            eprintln!("data        {line}");
        }
        match (self.plan.total_steps, &self.ends_with) {
            (Some(steps), Some(why)) => {
                eprintln!("length      {}, then {why}", counted(steps, "step"))
            }
            (Some(steps), None) => eprintln!("length      {}", counted(steps, "step")),
            _ => {}
        }
        if let Some(told) = &self.attention_told {
            eprintln!("attention   {told}");
        }
        let searches = self.device.is_cuda() && self.config.matmul == MatmulBackend::Search;
        if searches && !cache_file("matmul.txt").is_some_and(|file| file.exists()) {
            eprintln!(
                "matmul      timing cuBLASLt's algorithms in the first step, once: about 20 s"
            );
        }
        eprintln!("out_dir     {}", self.config.out_dir.display());
        if self.progress.step > 0 {
            let from = self.last_checkpoint.as_ref().map(|p| p.display().to_string());
            eprintln!("resume      step {} from {}", self.progress.step, from.unwrap_or_default());
        }
        if self.peak_flops.is_none() {
            eprintln!("mfu         n/a (no peak known for {name})");
        }
        Ok(())
    }
}
