//! The engine's sequences that have a row on the [`Card`].
//!
//! A step is launched before the tokens of the step before are known here, so that the card never waits for the CPU. Two
//! things follow. A sequence that turns out to have ended has one token more on its way, which is dropped. And blocks are
//! given for tokens that are still on their way.

use super::{Engine, Event, Sequence};
use crate::generate::card::{Choice, Chosen, Extension, Newcomer};
use crate::generate::request::Token;
use crate::generate::sampler::not_finite;
use crate::model::paged_cache::BLOCK;
use crate::ops::or_panic;
use anyhow::Result;
use std::collections::HashMap;
use tch::Tensor;

/// Where a sequence is on the card.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    /// Its row.
    row: usize,
    /// Tokens it had when it came.
    tokens: usize,
    /// Tokens on their way.
    ahead: usize,
    /// All its tokens are known or on their way.
    done: bool,
}

/// Tokens on their way from the card.
pub(super) struct Flight {
    chosen: Chosen,
    riders: Vec<Rider>,
}

/// Whose token it is.
struct Rider {
    sequence: (u64, usize),
    row: usize,
    /// Which of the flight's tokens.
    place: usize,
}

impl Engine<'_> {
    /// Lets the card make the next token of its sequences, then takes in those of the step before.
    pub(super) fn step_card(&mut self, events: &mut Vec<Event>) {
        let launched = self.launch(events);
        while self.flights.len() > usize::from(launched) {
            self.land(events);
        }
    }

    fn launch(&mut self, events: &mut Vec<Event>) -> bool {
        self.pause_done();
        while !self.grow_seats() {
            self.make_room(events);
        }
        let Some(card) = &mut self.card else { return false };
        let mut riders = Vec::new();
        for sequence in &mut self.running {
            let name = sequence.name();
            if let Some(seat) = sequence.seat.as_mut().filter(|seat| !seat.done) {
                seat.ahead += 1;
                riders.push(Rider { sequence: name, row: seat.row, place: seat.row });
            }
        }
        if riders.is_empty() {
            return false;
        }
        let chosen = or_panic(card.step(&mut self.cache));
        self.counters.steps += 1;
        self.flights.push_back(Flight { chosen, riders });
        true
    }

    /// Pauses rows whose last token is on its way.
    fn pause_done(&mut self) {
        let Some(card) = &mut self.card else { return };
        let context = self.model.config().max_length() as usize;
        let mut rows = Vec::new();
        for sequence in &mut self.running {
            let wanted = sequence.options.max_new_tokens.saturating_add(sequence.prompt_tokens);
            let known = sequence.tokens.len();
            if let Some(seat) = sequence.seat.as_mut().filter(|seat| !seat.done)
                && known + seat.ahead >= wanted.min(context)
            {
                seat.done = true;
                rows.push(seat.row);
            }
        }
        card.pause(&rows);
    }

    /// Gives each row the block that the token to be read needs; `false` where none is free.
    fn grow_seats(&mut self) -> bool {
        let Some(card) = &mut self.card else { return true };
        let (mut extensions, mut enough) = (Vec::new(), true);
        for sequence in &mut self.running {
            let Some(seat) = sequence.seat.filter(|seat| !seat.done) else { continue };
            if sequence.tokens.len() + seat.ahead <= sequence.table.len() * BLOCK {
                continue;
            }
            let Some(block) = self.pool.take() else {
                enough = false;
                break;
            };
            extensions.push(Extension { row: seat.row, index: sequence.table.len(), block });
            sequence.table.push(block);
        }
        card.extend(&extensions);
        enough
    }

    /// Takes in the oldest tokens that are on their way. The CPU waits for them.
    pub(super) fn land(&mut self, events: &mut Vec<Event>) {
        let Some(Flight { chosen, riders }) = self.flights.pop_front() else { return };
        let choices = or_panic(chosen.wait());
        let places: HashMap<_, _> =
            self.running.iter().enumerate().map(|(i, s)| (s.name(), i)).collect();
        let (mut ended, mut landed) = (Vec::new(), Vec::new());
        for rider in riders {
            // One that ended or was cancelled meanwhile has no place any more.
            let Some(&i) = places.get(&rider.sequence) else { continue };
            let sequence = &mut self.running[i];
            let Some(seat) = sequence.seat.as_mut().filter(|seat| seat.row == rider.row) else {
                continue;
            };
            seat.ahead -= 1;
            sequence.cached = sequence.tokens.len();
            let token = sequence.take_in(choices[rider.place]);
            landed.push(i);
            self.tell(i, token, events, &mut ended);
        }
        self.publish(landed.into_iter());
        self.remove_ended(&ended);
    }

    /// Sequences that the card can take: with its vocabulary, without alternatives, while it has rows.
    pub(super) fn for_card(&mut self, ends: &[(usize, i64)]) -> usize {
        let Some(card) = &mut self.card else { return 0 };
        let free = card.free();
        let fits = |&&(i, _): &&(usize, i64)| {
            let sequence: &Sequence = &self.running[i];
            sequence.options.top_logprobs == 0
                && card.limit_vocabulary(sequence.sampler.vocab_size())
        };
        ends.iter().take(free).take_while(fits).count()
    }

    /// Gives sequences a row on the card, which chooses their next token by these rows of the logits (.., V).
    pub(super) fn board(&mut self, ends: &[(usize, i64)], logits: &Tensor) {
        let Some(card) = self.card.as_mut().filter(|_| !ends.is_empty()) else { return };
        let at: Vec<i64> = ends.iter().map(|&(_, row)| row).collect();
        let logits = logits.index_select(0, &Tensor::from_slice(&at).to_device(logits.device())); // (E, V)
        let newcomer = |&(i, _): &(usize, i64)| {
            let s = &self.running[i];
            let drawn = s.tokens.len() - s.prompt_tokens;
            Newcomer { table: &s.table, tokens: &s.tokens, drawn, sampling: s.sampler.params() }
        };
        let newcomers: Vec<Newcomer> = ends.iter().map(newcomer).collect();
        let (rows, chosen) = or_panic(card.begin(&newcomers, &logits));
        let mut riders = Vec::new();
        for (place, (&(i, _), row)) in ends.iter().zip(rows).enumerate() {
            let sequence = &mut self.running[i];
            let tokens = sequence.tokens.len();
            sequence.seat = Some(Seat { row, tokens, ahead: 1, done: false });
            riders.push(Rider { sequence: sequence.name(), row, place });
        }
        self.flights.push_back(Flight { chosen, riders });
    }

    /// Frees the rows of sequences that leave; their tokens on the way are dropped when they land.
    pub(super) fn leave_card(&mut self, gone: &mut [Sequence]) {
        let Some(card) = &mut self.card else { return };
        let rows: Vec<usize> = gone.iter_mut().filter_map(Sequence::stand_up).collect();
        card.release(&rows);
    }
}

impl Sequence {
    /// Which sequence it is.
    fn name(&self) -> (u64, usize) {
        (self.request, self.index)
    }

    fn take_in(&mut self, choice: Choice) -> Result<Token> {
        let Choice { id, logprob } = choice;
        let Some(logprob) = logprob else { return not_finite() };
        self.tokens.push(id);
        Ok(Token { id, logprob, is_eos: self.options.eos.contains(&id), top: Vec::new() })
    }

    /// Gives its row back. Its own sampler goes on behind what the card drew.
    fn stand_up(&mut self) -> Option<usize> {
        let seat = self.seat.take()?;
        let Self { sampler, tokens, .. } = self;
        sampler.follow(&tokens[seat.tokens..]);
        Some(seat.row)
    }
}
