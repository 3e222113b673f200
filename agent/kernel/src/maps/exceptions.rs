//! The counters of exceptions: plaintext of and to held pods that passed, see `tacit_abi`'s `exception`.

use tacit_abi::Exception;

use super::Maps;

/// The counter of an exception at one hook.
#[derive(Debug, Clone, Copy)]
pub struct ExceptionCounter {
    /// Stable label.
    pub name: &'static str,
    /// Stable label of the hook.
    pub hook: &'static str,
    /// A description of the plaintext that passes.
    pub help: &'static str,
    /// Packets or connections since the map was made.
    pub value: u64,
}

impl Maps {
    /// Returns the counters of all exceptions at the hooks where they apply, summed over CPUs.
    #[must_use]
    pub fn exceptions(&self) -> Vec<ExceptionCounter> {
        let at_hooks = Exception::ALL
            .iter()
            .flat_map(|exception| exception.text().hooks.iter().map(|hook| (*exception, *hook)));
        let counter = |(exception, hook): (Exception, tacit_abi::ExceptionHook)| {
            let text = exception.text();
            let per_cpu = self.exceptions.get(&exception.counter(hook), 0);
            let value = per_cpu.map_or(0, |per_cpu| per_cpu.iter().sum());
            ExceptionCounter { name: text.name, hook: hook.label(), help: text.help, value }
        };
        at_hooks.map(counter).collect()
    }
}
