//! Groups the system calls of a BPF program, so that one is found by its group and not past all others: when a filter is loaded, the
//! kernel runs it for every number there is (`seccomp_cache_prepare`), and that takes as long as all else of the loading.
//!
//! Of a group the calls that are allowed as they are share one answer. That the meaning stays is tried as for shortened programs.

use seccompiler::sock_filter;

use super::shorten::{self, EQUAL, GREATER_EQUAL, LOAD, RETURN};

/// System calls of a group: about the square root of their number, for which the way is shortest; fewer where those are too long to be
/// jumped over.
const GROUPS: [usize; 3] = [6, 3, 1];
/// Instructions before the first call: the architecture is judged and the number loaded.
const BEGINNING: usize = 4;

/// A system call: its number, and its instructions from the comparison with that on.
type Call<'a> = (u32, &'a [sock_filter]);

/// The program in groups; as it was where it is built otherwise than expected.
pub fn group(program: Vec<sock_filter>) -> Result<Vec<sock_filter>, String> {
    let Some((calls, refusal)) = calls(&program) else { return Ok(program) };
    let grouped = GROUPS.into_iter().find_map(|size| groups(&calls, size, refusal));
    let Some(rest) = grouped else { return Ok(program) };
    let grouped: Vec<_> = program.iter().take(BEGINNING).cloned().chain(rest).collect();
    shorten::compare(&program, &grouped)?;
    Ok(grouped)
}

/// The calls in groups of this size; `None`: a jump would be too long.
fn groups(calls: &[Call<'_>], size: usize, refusal: &sock_filter) -> Option<Vec<sock_filter>> {
    let mut grouped = Vec::new();
    let groups: Vec<&[Call<'_>]> = calls.chunks(size).collect();
    for (number, group) in groups.iter().enumerate() {
        let body = body(group, refusal)?;
        if let Some((first, _)) = groups.get(number + 1).and_then(|next| next.first()) {
            let jt = u8::try_from(body.len()).ok()?;
            grouped.push(sock_filter { code: GREATER_EQUAL, jt, jf: 0, k: *first });
        }
        grouped.extend(body);
    }
    Some(grouped)
}

/// The calls in ascending order, and the last instruction, which refuses.
fn calls(program: &[sock_filter]) -> Option<(Vec<Call<'_>>, &sock_filter)> {
    let load = program.get(BEGINNING - 1).filter(|it| it.code == LOAD && it.k == 0);
    let (mut place, mut calls) = (load.map(|_| BEGINNING)?, Vec::<Call<'_>>::new());
    while let Some(first) = program.get(place).filter(|it| it.code == EQUAL && it.jt == 0) {
        let end = place + 1 + usize::from(first.jf);
        if calls.last().is_some_and(|(before, _)| *before >= first.k) {
            return None;
        }
        calls.push((first.k, program.get(place..end)?));
        place = end;
    }
    let refusal = program.get(place).filter(|it| it.code == RETURN && place + 1 == program.len())?;
    (!calls.is_empty()).then_some((calls, refusal))
}

/// A group: calls that are always allowed, those whose arguments are judged, refusal, permission.
fn body(group: &[Call<'_>], refusal: &sock_filter) -> Option<Vec<sock_filter>> {
    let is_plain = |(_, code): &&Call<'_>| matches!(code, [_, only] if only.code == RETURN);
    let plain: Vec<_> = group.iter().filter(is_plain).collect();
    let judged = group.iter().filter(|call| !is_plain(call)).flat_map(|(_, code)| code.iter().cloned());
    let judged: Vec<_> = judged.collect();
    let mut body = Vec::new();
    for (number, (call, _)) in plain.iter().enumerate() {
        let jt = u8::try_from(plain.len() - number - 1 + judged.len() + 1).ok()?;
        body.push(sock_filter { code: EQUAL, jt, jf: 0, k: *call });
    }
    body.extend(judged);
    body.push(refusal.clone());
    body.extend(plain.first().and_then(|(_, code)| code.last()).cloned());
    Some(body)
}
