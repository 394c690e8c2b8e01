//! Host memory for what a checkpoint is made of, kept from save to save.
//!
//! Training waits for the copies that a save begins with. Into page-locked memory they run at PCIe's speed, 6 GiB in a
//! quarter of a second; into memory that the system has to find first, they take some ten times as long. Finding and
//! locking it is done once, by a thread beside the first steps.

use crate::config::counted;
use crate::{doctor, ffi};
use anyhow::{Context, Result, anyhow, ensure};
use std::thread::{self, JoinHandle};
use tch::{Device, Tensor};

/// Tensors begin at multiples of so many bytes.
const ALIGN: i64 = 64;

/// The memory, or a thread that gets it.
#[derive(Default)]
pub struct Staging {
    memory: Option<Tensor>,
    coming: Option<JoinHandle<Result<Tensor>>>,
}

impl Staging {
    /// Starts to get page-locked memory for tensors of these sizes in bytes, for copies from `card`; as many as
    /// `sharers` ranks do on this host.
    pub fn start(sizes: &[u64], card: Device, sharers: usize) -> Result<Self> {
        let bytes = sizes.iter().map(|&bytes| aligned(bytes as i64)).sum();
        let get = move || {
            let free = doctor::available_memory().unwrap_or(u64::MAX) / sharers.max(1) as u64;
            ensure!(
                free / 2 > bytes as u64,
                "{bytes} bytes for each of {} here are more than half of what is free",
                counted(sharers as u64, "rank")
            );
            ffi::page_locked(bytes, card)
        };
        let coming = thread::Builder::new().name("staging".into()).spawn(get);
        Ok(Self { memory: None, coming: Some(coming.context("cannot start a thread")?) })
    }

    /// All of it anew. What was copied before must not be used any more.
    ///
    /// # Sync
    /// The first time, the CPU waits for the thread.
    ///
    /// # Errors
    /// The system did not give the memory; told once, [`Staging::copies`] does without.
    pub fn reuse(&mut self) -> Result<()> {
        if let Some(coming) = self.coming.take() {
            let memory = coming.join().map_err(|_| anyhow!("the thread that gets it panicked"))?;
            self.memory = Some(memory.context("no page-locked memory for checkpoints")?);
        }
        Ok(())
    }

    /// Copies of tensors on the host, one behind the other from byte `used` on, which is moved; where there is no room,
    /// in ordinary memory.
    ///
    /// # Sync
    /// The CPU waits for the card.
    pub fn copies(
        &self,
        used: &mut i64,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Vec<(String, Tensor)> {
        let copy = |(name, t): (String, Tensor)| {
            let t = t.detach();
            let copy = match self.room(used, &t) {
                Some(mut place) => {
                    place.copy_(&t);
                    place
                }
                None if t.device() == Device::Cpu => t.copy(),
                None => t.to_device(Device::Cpu),
            };
            (name, copy)
        };
        tensors.into_iter().map(copy).collect()
    }

    /// A place for a tensor's copy, of its dtype and shape.
    fn room(&self, used: &mut i64, t: &Tensor) -> Option<Tensor> {
        let memory = self.memory.as_ref()?;
        let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as i64;
        let start = *used;
        if start + aligned(bytes) > memory.size()[0] {
            return None;
        }
        *used += aligned(bytes);
        Some(memory.narrow(0, start, bytes).view_dtype(t.kind()).view(&t.size()[..]))
    }
}

fn aligned(bytes: i64) -> i64 {
    (bytes + ALIGN - 1) / ALIGN * ALIGN
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    fn named(tensors: &[Tensor]) -> Vec<(String, Tensor)> {
        tensors.iter().map(|t| ("x".to_owned(), t.shallow_clone())).collect()
    }

    #[test]
    fn copies_keep_dtype_shape_and_values_with_and_without_room() {
        let a = Tensor::randn([3, 5], (Kind::BFloat16, Device::Cpu));
        let b = Tensor::randn([7], (Kind::Float, Device::Cpu));
        let c = Tensor::from_slice(&[1u8, 2, 3]);
        let memory = Some(Tensor::zeros([64 + 64 + 32], (Kind::Uint8, Device::Cpu)));
        let staging = Staging { memory, coming: None };
        for staging in [staging, Staging::default()] {
            let mut used = 0;
            let copies = staging.copies(&mut used, named(&[a.shallow_clone(), b.copy()]));
            let more = staging.copies(&mut used, named(&[c.shallow_clone()])); // no room for it
            let (x, y, z) = (&copies[0].1, &copies[1].1, &more[0].1);
            assert_eq!((x, y, z), (&a, &b, &c));
            assert_eq!((x.kind(), x.size()), (Kind::BFloat16, vec![3, 5]));
            assert_eq!(used, if staging.memory.is_some() { 128 } else { 0 });
            let _ = a.shallow_clone().fill_(0.5);
            assert!(x.ne_tensor(&a).any().int64_value(&[]) == 1, "a copy has memory of its own");
            a.shallow_clone().copy_(x);
        }
    }

    #[test]
    fn memory_that_is_not_to_be_had_is_told_once() {
        let mut staging = Staging::start(&[1 << 60], Device::Cuda(0), 1).unwrap();
        let error = format!("{:#}", staging.reuse().unwrap_err());
        assert!(error.contains("more than half of what is free"), "{error}");
        staging.reuse().unwrap();
        let x = Tensor::from_slice(&[1.5f32]);
        assert_eq!(staging.copies(&mut 0, named(&[x.shallow_clone()]))[0].1, x);
    }
}
