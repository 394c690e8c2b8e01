//! Runs of more than one process: starting them, how they find and watch each other, and how all of them end.
//!
//! Read first: [`Job`], what training gets. `pretrain CONFIG --devices N` calls [`launch`], which starts N workers,
//! this same program with `RANK`, `WORLD_SIZE`, .. set; `torchrun --no-python`, `srun` or a shell loop may do so as
//! well. A worker reads them ([`World`]), meets the others at a store ([`rendezvous`]) and from then on is watched
//! (`watch`, [`observer`]): a rank that dies, fails or hangs ends the job on all ranks within seconds ([`failure`]).

mod address;
pub mod failure;
mod fsdp;
mod job;
mod judge;
mod launch;
pub mod layout;
pub mod logs;
pub mod observer;
mod parallelize;
pub mod rendezvous;
pub mod saver;
pub mod staging;
pub mod store;
mod watch;
mod world;

pub use fsdp::{Fsdp, Groups, Held};
pub use job::Job;
pub use launch::launch;
pub use parallelize::{Fill, Plan, Ranks, parallelize};
pub use rendezvous::meet;
pub use store::Store;
pub use world::{Address, Starter, World};

/// Lets this process open as many files as the system allows: whoever serves the store has some connections for each
/// rank, and 1,024 are the usual limit.
fn allow_many_files() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }); // else as it was
    }
}
